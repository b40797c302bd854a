"""Which buckets of object stores are read otherwise than with this process's credentials alone."""

from data_prep import s3
from pipeline.config import Places


def use_buckets(places: Places) -> None:
    """Let this process, and those that it starts, read public and requester-pays buckets as `storage.s3` says."""
    s3.use_buckets(places.storage.s3.anonymous, places.storage.s3.requester_pays)
