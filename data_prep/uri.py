"""Storage addresses: what a URI is, its one spelling, and the error that names it."""

import os
import unicodedata
from urllib.parse import unquote, urlsplit

from data_prep.redact import without_secrets

_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))


class StorageError(ValueError):
    """A storage operation failed; the message is one line that names the URI and the remedy."""


class DamageError(StorageError):
    """What is stored is not what was written: trying again does not help."""


def printable(text: str) -> str:
    """A name or message as it can be shown in one line by any program.

    Control characters, line separators and bytes that are no UTF-8 are escaped: `caf\\xe9.jpg`, `line\\u2028sep.jpg`.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _UNPRINTABLE:
        return char
    is_byte = "\udc80" <= char <= "\udcff"
    code = char.encode(errors="surrogateescape") if is_byte else char.encode("unicode_escape")
    return code.decode(errors="backslashreplace")


def normalise(uri: str | os.PathLike[str]) -> str:
    """The one spelling of a URI: `s3://bucket/key`, or an absolute path for a local path and `file://`.

    A path is cleaned. A key stays as it is but for one trailing `/`, as people end a prefix: in an object store `a//b`
    is another key than `a/b`. Raises StorageError for an empty URI, another scheme, `s3://` without a bucket, and for
    keys that programs on the way would read as others (see `key_fault`), or with credentials in it.
    """
    text = os.fspath(uri)
    scheme = text.split("://", 1)[0] if "://" in text else ""
    if scheme == "s3":
        if any(mark in text.split("/", 3)[2] for mark in "@:"):  # in no bucket's name; behind it they belong to a key
            refuse_secrets(text)
        return _object_uri(text)
    if scheme == "file":
        text = unquote(urlsplit(text).path)
    elif scheme:
        raise StorageError(f"{without_secrets(text)!r}: scheme {scheme}:// is unknown; use a path, file:// or s3://")
    if not text:
        raise StorageError("a storage URI is empty; give a path, file:// or s3://bucket/prefix")
    return os.path.abspath(os.path.expanduser(text))


def refuse_secrets(uri: str | os.PathLike[str]) -> None:
    """StorageError where a URI carries credentials: names made below it would carry them as well."""
    text = os.fspath(uri)
    if (shown := without_secrets(text)) != text:
        raise StorageError(
            f"{shown!r} was given with credentials in it: leave them out of the URI, set AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY"
        )


def _object_uri(text: str) -> str:
    bucket, _, key = text.removeprefix("s3://").partition("/")
    if not bucket:
        raise StorageError(f"{text!r} names no bucket; write s3://bucket/prefix")
    key = key.removesuffix("/")
    if fault := key_fault(key):
        raise StorageError(f"{text!r}: its key {fault}")
    return f"s3://{bucket}/{key}" if key else f"s3://{bucket}"


def key_fault(key: str) -> str:
    """Why a key cannot be told from another one on its way to the object; empty where it can."""
    if key.endswith("/"):
        return "ends in an empty part, as for a folder; name the object, or a prefix with one / at its end"
    if any(part in (".", "..") for part in key.split("/")):
        return "has the part . or .., which servers read as another key; rename the object"
    return ""


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """`uri` with names or relative paths appended, without empty parts between them."""
    base = normalise(uri)
    names = [name for part in parts for name in part.split("/") if name]
    return normalise("/".join([base, *names]))


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether the URI is on this machine's file system."""
    return not normalise(uri).startswith("s3://")


def split_s3(uri: str) -> tuple[str, str]:
    """(bucket, key) of an `s3://` URI; the key is empty for a whole bucket."""
    bucket, _, key = normalise(uri).removeprefix("s3://").partition("/")
    return bucket, key
