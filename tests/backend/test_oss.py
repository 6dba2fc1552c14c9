"""OSS: signatures as Alibaba's own library makes them, and reads from a server that checks them with it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.errors import ConfigError, CredentialsRejectedError, NoSuchBlobError
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.base import BlobBackend
from nydusd.storage.backend.keys import Keys
from nydusd.storage.backend.oss import sign_v1
from tests.support import oss_server as oss
from tests.support.faulty_server import Reply as FaultyReply
from tests.support.faulty_server import faulty
from tests.support.object_server import Reply, names_are_local, object_server
from tests.support.oss_server import OssServer, oss_server

CONTENT = bytes(range(256)) * 400
OBJECTS = {"b1": CONTENT, "pre fix/é+~%41/b1": CONTENT[::-1], "x//b1": b"slash"}
HOUR = 3600.0

words = st.text("ABCdef019/+=._-", min_size=1, max_size=40)


@pytest.fixture
def server() -> Iterator[OssServer]:
    with names_are_local(oss.DOMAIN), oss_server(OBJECTS) as running:
        yield running


@contextlib.contextmanager
def backend(config: dict[str, object]) -> Iterator[BlobBackend]:
    made = make_backend("oss", config)
    try:
        yield made
    finally:
        made.close()


@given(
    method=st.sampled_from(["GET", "HEAD"]),
    bucket=st.sampled_from(["b", "my-bucket"]),
    key=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40),
    keys=st.builds(Keys, words, words, st.one_of(st.just(""), words)),
    own=st.dictionaries(st.sampled_from(["x-oss-b", "X-Oss-A", "x-oss-request-payer", "Range", "X-Other"]), words),
    now=st.integers(0, 4102444800),
)
def test_any_request_is_signed_as_alibabas_library_signs_it(
    method: str, bucket: str, key: str, keys: Keys, own: dict[str, str], now: int
) -> None:
    ours = sign_v1(keys, method, f"/{bucket}/{key}", own, now)
    sent = {name.lower(): value for name, value in {**own, **ours}.items()}
    authorization = sent.pop("authorization")
    assert authorization == oss.expected(method, bucket, key, sent, keys.key_id, keys.secret)
    assert sent["date"] == formatdate(now, usegmt=True)
    assert sent.get("x-oss-security-token", "") == keys.session_token


@pytest.mark.parametrize(("prefix", "content"), [("", CONTENT), ("pre fix/é+~%41/", CONTENT[::-1]), ("x//", b"slash")])
def test_signed_reads(server: OssServer, prefix: str, content: bytes) -> None:
    with backend(server.config(object_prefix=prefix)) as made:
        reader = made.get_reader("b1")
        assert reader.blob_size() == len(content)
        assert reader.read(0, len(content)) == content
        assert reader.read(3, 2) == content[3:5]
    assert set(server.server.statuses) <= {200, 206}


def test_a_blob_that_is_not_there(server: OssServer) -> None:
    with backend(server.config()) as made, pytest.raises(NoSuchBlobError):
        made.get_reader("b2").read(0, 1)


@pytest.mark.parametrize(
    "wrong", [{"access_key_secret": "BADSECRET"}, {"access_key_id": "BADID"}, {"access_key_id": ""}]
)
def test_wrong_or_no_keys_are_refused_without_showing_them(server: OssServer, wrong: dict[str, str]) -> None:
    with backend(server.config(**wrong)) as made, pytest.raises(CredentialsRejectedError) as caught:
        made.get_reader("b1").read(0, 1)
    shown = str(caught.value)
    assert not [word for word in (oss.SECRET, oss.KEY_ID, "BAD", "OSS ") if word in shown]
    assert len(server.server.asked) == 1


def test_public_buckets_are_read_without_a_signature() -> None:
    with names_are_local(oss.DOMAIN), oss_server(OBJECTS, public=True) as server:
        with backend(server.config(access_key_id="", access_key_secret="")) as made:
            assert made.get_reader("b1").read(0, 10) == CONTENT[:10]
        assert "authorization" not in server.server.asked[0].headers


@pytest.mark.parametrize("offset", [-HOUR, HOUR, 400 * 24 * HOUR])
def test_a_clock_that_is_off_is_corrected_by_the_servers(server: OssServer, offset: float) -> None:
    server.server.clock_offset = offset
    with backend(server.config()) as made:
        reader = made.get_reader("b1")
        assert reader.read(0, 10) == CONTENT[:10]
        assert reader.read(10, 10) == CONTENT[10:20]
    assert server.server.statuses == [403, 206, 206]


def test_a_clock_that_is_right_is_not_blamed_for_a_refusal(server: OssServer) -> None:
    server.only_with("OTHER", "keys")
    server.server.clock_offset = 30
    with backend(server.config()) as made, pytest.raises(CredentialsRejectedError):
        made.get_reader("b1").read(0, 1)
    assert server.server.statuses == [403]


def test_a_clock_that_nobody_has_is_not_believed() -> None:
    """Requests could not be signed any more by such a time."""
    with names_are_local(oss.DOMAIN), faulty() as server:
        server.default = lambda request: FaultyReply(403, {"Date": "Fri, 31 Dec 9999 23:59:59 -2359"})
        config: dict[str, object] = {
            "scheme": "http",
            "endpoint": f"{oss.DOMAIN}:{server.port}",
            "bucket_name": "b",
            "access_key_id": "ID",
            "access_key_secret": "SECRET",
        }
        with backend(config) as made, pytest.raises(CredentialsRejectedError):
            made.get_reader("b1").read(0, 1)
        assert server.count() == 1


def test_session_tokens_and_their_renewal(server: OssServer, tmp_path: Path) -> None:
    path = tmp_path / "keys"

    def renew(number: int) -> None:
        new = tmp_path / "new"
        key_id, secret, token = f"ID{number}", f"SECRET{number}", f"TOKEN{number}"
        new.write_text(f"[x]\naccess_key_id={key_id}\naccess_key_secret={secret}\nsecurity_token={token}\n")
        new.rename(path)
        server.only_with(key_id, secret, token)

    renew(1)
    config = server.config(credentials_file=str(path), access_key_id="", access_key_secret="")
    with backend(config) as made:
        reader = made.get_reader("b1")
        assert reader.read(0, 10) == CONTENT[:10]
        renew(2)
        assert reader.read(10, 10) == CONTENT[10:20]
    assert server.server.statuses == [206, 206]


def test_headers_of_the_operator_are_signed_where_oss_wants_it(
    server: OssServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYDUS_HEADER_x-oss-request-payer", "requester")
    with backend(server.config()) as made:
        assert made.get_reader("b1").read(0, 10) == CONTENT[:10]
    assert server.server.asked[0].headers["x-oss-request-payer"] == "requester"


def test_a_redirect_to_another_host_gets_no_signature(server: OssServer) -> None:
    with object_server({"/there": CONTENT}) as other:
        server.server.guard = lambda asked: Reply(302, {"Location": f"http://{other.address}/there"})
        with backend(server.config(session_token="TOKEN")) as made:
            assert made.get_reader("b1").read(5, 5) == CONTENT[5:10]
        assert not {"authorization", "x-oss-security-token"} & set(other.asked[0].headers)


def test_time_is_asked_for_each_attempt(server: OssServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature made when the read began would be too old after long waiting."""
    ticks = iter([time.time(), time.time() + 600])
    monkeypatch.setattr("nydusd.storage.backend.object_store.time", type("T", (), {"time": lambda: next(ticks)}))
    with backend(server.config()) as made:
        made.get_reader("b1").read(0, 1)
        made.get_reader("b1").read(1, 1)
    first, second = (asked.headers["date"] for asked in server.server.asked)
    assert first != second


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"endpoint": ""}, "'endpoint' is no host name"),
        ({"endpoint": "https://oss.test"}, "'endpoint' is no host name"),
        ({"endpoint": "oss.test/x"}, "'endpoint' is no host name"),
        ({"scheme": "unix"}, "'scheme' is 'unix'"),
        ({"bucket_name": "a.evil.test/"}, "'bucket_name' is"),
        ({"object_prefix": "../x"}, "'object_prefix' is"),
        ({"object_prefix": 7}, "object_prefix"),
    ],
)
def test_configurations_that_cannot_be_used(wrong: dict[str, object], says: str) -> None:
    config = {"endpoint": "oss.test", "bucket_name": "b", **wrong}
    with pytest.raises(ConfigError, match=f"backend oss.*{says}"):
        make_backend("oss", config)
