"""What tests of the reading share."""

from collections import Counter

import pytest

from data_prep import shard_cache


@pytest.fixture
def as_if_remote(monkeypatch):
    """A set in a folder, read as one in an object store is; counts of the downloads and ranges by address."""
    counts = Counter()

    def counted(name):
        real = getattr(shard_cache, name)

        def call(uri, *arguments):
            counts[name, uri, *(arguments if name == "read_range" else ())] += 1
            return real(uri, *arguments)

        monkeypatch.setattr(shard_cache, name, call)

    counted("download")
    counted("read_range")
    monkeypatch.setattr(shard_cache, "is_local", lambda uri: False)
    return counts
