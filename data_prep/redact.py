"""Text without the secrets that URIs in it carry: logins before a host, and parameters such as `token=`."""

import re

# up to the last @ before the path; MLflow, boto3 and SQLAlchemy take what lies before it for a login
_LOGIN = re.compile(r'(?P<scheme>[A-Za-z][\w+.-]*)://(?P<login>[^\s"/?#]*)@')
# a login with a bare / ? or # in it: what follows the host's colon is no port
_BROKEN_LOGIN = re.compile(
    r'(?P<scheme>[A-Za-z][\w+.-]*)://(?P<login>(?!arn:)[^\s"/?#@:\[\]]*:(?!\d*(?:[\s"/?#\',;)]|$))[^\s"]*)@'
)
_QUERY = re.compile(r'(?P<place>[A-Za-z][\w+.-]*://[^\s"?#]*)(?P<query>[?#][^\s"]*)')
_SECRET_NAME = re.compile(
    r"token|passw|passphrase|pwd|secret|signature|credential|api[-_.]?key|access[-_.]?key|private[-_.]?key"
    r"|^(?:sig|key|auth|authorization|code|jwt|sas|odbc_connect)$",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """A URI, or a text with URIs in it, without what logs in; what has no secrets comes back as it is.

    An address of a web server loses all of its login, since a name alone would stand in the way of one from the
    environment; others keep the user's name. Parameters whose name tells of a secret go as a whole.
    """
    if "://" not in text or not any(mark in text for mark in "@?#"):
        return text
    for pattern in (_LOGIN, _BROKEN_LOGIN):
        text = pattern.sub(_without_login, text)
    return _QUERY.sub(lambda found: found["place"] + _without_parameters(found["query"]), text)


def _without_login(found: re.Match[str]) -> str:
    user = found["login"].partition(":")[0]
    keeps_user = user and found["scheme"].lower() not in ("http", "https", "s3")
    return f"{found['scheme']}://{user + '@' if keeps_user else ''}"


def _without_parameters(query: str) -> str:
    """A query or fragment, from its ? or # on, without its secret parameters."""
    parts = re.split(r"([?#&;])", query)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    kept = [(mark, pair) for mark, pair in pairs if not ("=" in pair and _SECRET_NAME.search(pair.partition("=")[0]))]
    text = "".join(mark + pair for mark, pair in kept)
    return query[0] + text[1:] if text and text[0] in "&;" else text


def redacted(value: object) -> object:
    """A JSON-able value whose strings, keys of mappings as well, are without secrets."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value
