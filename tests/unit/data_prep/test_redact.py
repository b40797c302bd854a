"""Which parts of URIs are secrets, and what is left of texts that hold them."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import storage
from data_prep.redact import redacted, without_secrets
from data_prep.storage import StorageError

NAMES = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
# a prefix, lest the secret is a part of the rest by chance
MARKS = "%:!$&'()*+,;=-._~"
SECRETS = st.text(string.ascii_letters + string.digits + MARKS, max_size=12).map("qZ7{}9Xk".format)
SCHEMES = st.sampled_from(["http", "https", "postgresql+psycopg2", "mysql", "s3", "redis"])
PLAIN = [
    "http://host:5000/prefix",
    "http://[::1]:5000/x@y",
    "https://host/a?page=2&size=3#top",
    "s3://bucket/user@home/photo?width=3.png",
    "s3://arn:aws:s3:eu-west-1:123:accesspoint/name/a@b",
    "sqlite:////home/o'brien/mlflow.db?timeout=30",
    "postgresql://user@host/db?sslmode=require",
    "models:/demo-x2@champion",
    "mail to a@b.org, or look at http://host:5000, x@y",
    "no address at all: a@b ?token=1",
]


@pytest.mark.parametrize("text", PLAIN)
def test_what_has_no_secrets_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@given(
    NAMES,
    SECRETS | SECRETS.map("qZ7@{}".format),
    st.sampled_from(["http", "https", "postgresql+psycopg2", "mysql", "s3", "redis"]),
)
def test_no_password_stays(user: str, secret: str, scheme: str) -> None:
    text = without_secrets(f"MLflow at {scheme}://{user}:{secret}@host:5000/path refuses")
    assert secret not in text
    assert text.endswith("host:5000/path refuses")


@given(SECRETS, st.sampled_from("/?#"), SECRETS)
def test_nor_one_that_ought_to_be_quoted(first: str, mark: str, second: str) -> None:
    shown = without_secrets(f"http://u:{first}{mark}{second}@host:5000")
    assert first not in shown
    assert second not in shown


@pytest.mark.parametrize(
    "name", ["token", "access_token", "password", "X-Amz-Signature", "X-Amz-Credential", "api_key", "sig", "Secret"]
)
@pytest.mark.parametrize("mark", "?#")
def test_no_secret_parameter_stays_and_others_do(name: str, mark: str) -> None:
    assert without_secrets(f"https://host/x{mark}{name}=SECRET") == "https://host/x"
    assert without_secrets(f"https://host/x{mark}{name}=SECRET&a=1") == f"https://host/x{mark}a=1"
    assert without_secrets(f"https://host/x{mark}a=1&{name}=SECRET&b") == f"https://host/x{mark}a=1&b"


def test_a_database_keeps_its_users_name_and_a_web_server_none() -> None:
    assert without_secrets("postgresql://me:SECRET@host/db") == "postgresql://me@host/db"
    assert without_secrets("https://SECRET@host") == "https://host"  # a token, as likely as not


def test_values_are_cleaned_all_the_way_down() -> None:
    given = {"a": ["http://u:SECRET@host", 1, None], "http://u:SECRET@host": ({"b": True},)}
    assert redacted(given) == {"a": ["http://host", 1, None], "http://host": [{"b": True}]}


@pytest.mark.parametrize("uri", ["s3://KEY:hunter2@bucket/x", "s3://KEY:hunt/er2@bucket/x", "https://u:hunter2@host/x"])
def test_storage_with_a_login_is_refused_without_telling_it(uri: str) -> None:
    with pytest.raises(StorageError) as refused:
        storage.normalise(uri)
    assert "hunt" not in str(refused.value)


def test_nothing_is_written_below_a_name_that_is_a_secret() -> None:
    with pytest.raises(StorageError, match=r"^'s3://bucket/x' was given with credentials in it: ") as refused:
        storage.check_writable("s3://bucket/x?X-Amz-Signature=hunter2")
    assert "hunter2" not in str(refused.value)
