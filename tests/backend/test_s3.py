"""S3: against OpenStack Swift, which checks signatures, and against made-up answers where only AWS gives them."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nydusd.errors import BackendError, ConfigError, CredentialsRejectedError, NoSuchBlobError
from nydusd.storage.backend import make_backend
from nydusd.storage.backend.base import BlobBackend
from nydusd.storage.backend.http.answer import Answer
from nydusd.storage.backend.s3 import S3Backend
from tests.support import botocore_client
from tests.support.object_server import Asked, ObjectServer, Reply, names_are_local, object_server
from tests.support.s3_server import DOMAIN, SECRET, S3Server

CONTENT = bytes(range(256)) * 400
DAY = 86400.0


@contextlib.contextmanager
def backend(config: dict[str, object]) -> Iterator[BlobBackend]:
    made = make_backend("s3", config)
    try:
        yield made
    finally:
        made.close()


def fake(**more: object) -> dict[str, object]:
    config = {"scheme": "http", "region": "here-1", "bucket_name": "images", "access_key_id": "ID", **more}
    return {"endpoint": "127.0.0.1:1", "access_key_secret": SECRET, **config}


def url(**more: object) -> str:
    made = S3Backend.from_config(fake(**more))
    try:
        return made.blob_url("b1")
    finally:
        made.close()


@pytest.fixture(scope="module")
def stored(s3: S3Server) -> S3Server:
    s3.put({"b1": CONTENT, "pre fix/é+~%41/b1": CONTENT[::-1], "x//b1": b"slashes"})
    return s3


@pytest.mark.parametrize("style", ["path", "virtual host"])
@pytest.mark.parametrize(
    ("prefix", "content"), [("", CONTENT), ("pre fix/é+~%41/", CONTENT[::-1]), ("x//", b"slashes")]
)
def test_signed_reads(stored: S3Server, style: str, prefix: str, content: bytes) -> None:
    more = {"virtual_host": True, "endpoint": f"{DOMAIN}:{stored.port}"} if style == "virtual host" else {}
    with names_are_local(DOMAIN), backend(stored.config(object_prefix=prefix, **more)) as made:
        reader = made.get_reader("b1")
        assert reader.blob_size() == len(content)
        assert reader.read(0, len(content)) == content
        assert reader.read(3, 4) == content[3:7]


def test_a_blob_that_is_not_there(stored: S3Server) -> None:
    with backend(stored.config()) as made, pytest.raises(NoSuchBlobError):
        made.get_reader("b2").read(0, 1)


@pytest.mark.parametrize("wrong", [{"access_key_secret": "BADSECRET"}, {"access_key_id": "BADID"}])
def test_wrong_keys_are_refused_without_showing_them(stored: S3Server, wrong: dict[str, str]) -> None:
    with backend(stored.config(**wrong)) as made, pytest.raises(CredentialsRejectedError) as caught:
        made.get_reader("b1").read(0, 1)
    assert not re.search(f"{SECRET}|BAD|Signature=", str(caught.value))


def test_no_keys_are_refused_by_a_bucket_that_is_not_public(stored: S3Server) -> None:
    """Swift says 400 to that; S3 itself says 403."""
    with backend(stored.config(access_key_id="")) as made, pytest.raises(BackendError, match=r"status 40[03]"):
        made.get_reader("b1").read(0, 1)


def test_a_clock_that_is_off_is_corrected_by_the_servers(stored: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    with backend(stored.config()) as made:
        monkeypatch.setattr("nydusd.storage.backend.object_store.time.time", lambda: real() - DAY)
        try:
            reader = made.get_reader("b1")
            assert reader.read(0, 1000) == CONTENT[:1000]
            first = made.metrics.requests
            assert reader.read(1000, 1000) == CONTENT[1000:2000]
            assert (first, made.metrics.requests) == (2, 3)
        finally:
            monkeypatch.undo()


def test_the_region_is_learnt_from_the_answer(stored: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with backend(stored.config(region="us-east-1")) as made:
        assert made.get_reader("b1").read(0, 1000) == CONTENT[:1000]
        assert made.get_reader("b1").blob_size() == len(CONTENT)
    assert "bucket images is in region eu-test-1, not in us-east-1" in caplog.text


def test_the_size_is_had_although_head_does_not_name_the_region(stored: S3Server) -> None:
    with backend(stored.config(region="us-east-1")) as made:
        assert made.get_reader("b1").blob_size() == len(CONTENT)


class Regional:
    """Lets pass what botocore signs for the region `there-2`, and answers the rest as AWS does."""

    def __init__(self, reply: Reply, token: str = "", key_id: str = "ID") -> None:
        self.reply = reply
        self.token = token
        self.key_id = key_id

    def __call__(self, asked: Asked) -> Reply | None:
        given = asked.headers.get("authorization", "")
        date = asked.headers.get("x-amz-date", "19700101T000000Z")
        signed = re.search("SignedHeaders=([^,]*)", given)
        headers = {name: asked.headers[name] for name in (signed[1].split(";") if signed else []) if name != "host"}
        wanted = botocore_client.signed_headers(
            asked.method,
            f"http://{asked.headers['host']}{asked.path}",
            headers,
            "there-2",
            self.key_id,
            SECRET,
            self.token,
            botocore_client.seconds(date),
        )
        return None if given == wanted["authorization"] else self.reply


REGION = {"x-amz-bucket-region": "there-2"}


@contextlib.contextmanager
def regional(reply: Reply) -> Iterator[tuple[ObjectServer, dict[str, object]]]:
    with object_server({"/images/b1": CONTENT}, Regional(reply)) as server:
        yield server, fake(endpoint=server.address)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(301, REGION, b"<Error><Code>PermanentRedirect</Code></Error>"),
        Reply(307, {**REGION, "Location": "http://elsewhere.test/images/b1"}),
        Reply(400, REGION, b"<Error><Code>AuthorizationHeaderMalformed</Code></Error>"),
        Reply(400, {}, b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>there-2</Region></Error>"),
        Reply(403, REGION),
    ],
    ids=["301", "307 to another host", "400", "400 in the body alone", "403"],
)
def test_another_region_takes_one_more_request_once(reply: Reply) -> None:
    with regional(reply) as (server, config), backend(config) as made:
        reader = made.get_reader("b1")
        assert reader.read(0, 10) == CONTENT[:10]
        assert reader.read(10, 10) == CONTENT[10:20]
        assert server.statuses == [reply.status, 206, 206]


def test_regions_that_never_fit_end_in_an_error() -> None:
    answers = iter(range(100))

    def guard(asked: Asked) -> Reply:
        return Reply(301, {"x-amz-bucket-region": f"r-{next(answers)}"})

    with object_server({}, guard) as server, backend(fake(endpoint=server.address)) as made:
        with pytest.raises(BackendError):
            made.get_reader("b1").read(0, 1)
        assert len(server.asked) <= 4


@pytest.mark.parametrize("region", ["evil.test/", "a b", "x" * 65, "../x", "ü"])
def test_a_region_that_is_no_name_is_not_taken(region: str) -> None:
    reply = Reply(301, {"x-amz-bucket-region": region.encode().decode("latin-1")})
    with object_server({}, lambda asked: reply) as server, backend(fake(endpoint=server.address)) as made:
        with pytest.raises(BackendError):
            made.get_reader("b1").read(0, 1)
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("endpoint", "moved"),
    [
        ("", "s3.there-2.amazonaws.com"),
        ("s3.here-1.amazonaws.com", "s3.there-2.amazonaws.com"),
        ("s3-here-1.amazonaws.com", "s3.there-2.amazonaws.com"),
        ("s3.cn-north-1.amazonaws.com.cn", "s3.there-2.amazonaws.com.cn"),
        ("s3.dualstack.here-1.amazonaws.com", "s3.dualstack.there-2.amazonaws.com"),
        ("s3.amazonaws.com.evil.test", "s3.amazonaws.com.evil.test"),
        ("evil-s3.amazonaws.com", "evil-s3.amazonaws.com"),
        ("minio.test:9000", "minio.test:9000"),
    ],
)
def test_the_host_follows_the_region_at_aws_only(endpoint: str, moved: str) -> None:
    made = S3Backend.from_config(fake(endpoint=endpoint))
    try:
        answer = cast(Answer, SimpleNamespace(status=301, headers=REGION))
        assert made.remedy(answer, 0)
        assert made.blob_url("b1") == f"http://{moved}/images/b1"
        assert not made.remedy(answer, 1)
    finally:
        made.close()


def test_redirects_that_speak_of_no_region_are_followed_without_the_signature() -> None:
    """A gateway may redirect to a signed URL elsewhere: that host must not see our keys' signature or token."""
    with object_server({"/signed": CONTENT}) as other:
        reply = Reply(307, {"Location": f"http://{other.address}/signed?sig=x"})
        other.objects["/signed?sig=x"] = CONTENT
        with object_server({}, lambda asked: reply) as server:
            config = fake(endpoint=server.address, session_token="TOKEN")
            with backend(config) as made:
                assert made.get_reader("b1").read(5, 5) == CONTENT[5:10]
            assert "x-amz-security-token" in server.asked[0].headers
            assert not {"authorization", "x-amz-security-token", "x-amz-date"} & set(other.asked[0].headers)


def test_session_tokens_are_sent_and_signed() -> None:
    guard = Regional(Reply(403), token="TOKEN/+=")
    with object_server({"/images/b1": CONTENT}, guard) as server:
        config = fake(endpoint=server.address, region="there-2")
        with backend({**config, "session_token": "TOKEN/+="}) as made:
            assert made.get_reader("b1").read(0, 10) == CONTENT[:10]
        with backend(config) as made, pytest.raises(CredentialsRejectedError):
            made.get_reader("b1").read(0, 10)


def write_keys(path: Path, key_id: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(f"[default]\naws_access_key_id={key_id}\naws_secret_access_key={SECRET}\n")
    new.rename(path)


@pytest.mark.parametrize("status", [400, 401, 403])
def test_keys_renewed_in_their_file_while_the_old_ones_are_refused(tmp_path: Path, status: int) -> None:
    """The file is renewed between the request and its answer; AWS says 400 for a token that is over."""
    path = tmp_path / "keys"
    write_keys(path, "OLD")
    checked = Regional(Reply(status), key_id="NEW")

    def guard(asked: Asked) -> Reply | None:
        reply = checked(asked)
        if reply is not None:
            write_keys(path, "NEW")
        return reply

    with object_server({"/images/b1": CONTENT}, guard) as server:
        config = fake(endpoint=server.address, region="there-2", credentials_file=str(path))
        with backend(config) as made:
            assert made.get_reader("b1").read(0, 10) == CONTENT[:10]
        assert server.statuses == [status, 206]


def test_headers_of_the_operator_are_signed_where_s3_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYDUS_HEADER_x-amz-request-payer", "requester")
    guard = Regional(Reply(403))
    with object_server({"/images/b1": CONTENT}, guard) as server:
        with backend(fake(endpoint=server.address, region="there-2")) as made:
            assert made.get_reader("b1").read(0, 10) == CONTENT[:10]
        asked = server.asked[0]
        assert asked.headers["x-amz-request-payer"] == "requester"
        assert ";x-amz-request-payer" in asked.headers["authorization"]


def test_public_buckets_are_read_without_a_signature() -> None:
    with object_server({"/images/b1": CONTENT}) as server:
        with backend(fake(endpoint=server.address, access_key_id="", access_key_secret="")) as made:
            assert made.get_reader("b1").read(0, 10) == CONTENT[:10]
        assert not [name for name in server.asked[0].headers if name.startswith("x-amz") or name == "authorization"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"endpoint": "", "scheme": "https"}, "https://s3.amazonaws.com/images/b1"),
        ({"endpoint": "HOST.test:80"}, "http://host.test/images/b1"),
        ({"endpoint": "host.test:443"}, "http://host.test:443/images/b1"),
        ({"endpoint": "host.test:443/", "scheme": "https"}, "https://host.test/images/b1"),
        ({"endpoint": "[::1]:9000"}, "http://[::1]:9000/images/b1"),
        ({"endpoint": "h", "object_prefix": "a b/c-"}, "http://h/images/a%20b/c-b1"),
        ({"endpoint": "h", "virtual_host": True, "bucket_name": "My.bucket"}, "http://my.bucket.h/b1"),
    ],
)
def test_urls(config: dict[str, object], expected: str) -> None:
    assert url(**config) == expected


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"endpoint": "http://host"}, "'endpoint' is no host name"),
        ({"endpoint": "user:SECRETWORD@host"}, "'endpoint' is no host name"),
        ({"endpoint": "host/path"}, "'endpoint' is no host name"),
        ({"endpoint": "host:99999"}, "'endpoint' is no host name"),
        ({"endpoint": "host:0"}, "'endpoint' is no host name"),
        ({"endpoint": "ho st"}, "'endpoint' is no host name"),
        ({"scheme": "ftp"}, "'scheme' is 'ftp'"),
        ({"bucket_name": "a/b"}, "'bucket_name' is 'a/b'"),
        ({"bucket_name": ".."}, "'bucket_name' is"),
        ({"bucket_name": ""}, "'bucket_name' is"),
        ({"bucket_name": "a_b", "virtual_host": True}, "'virtual_host'"),
        ({"region": ""}, "'region' is"),
        ({"region": "x\r\ny"}, "'region' is"),
        ({"object_prefix": "a/../b"}, "'object_prefix' is"),
        ({"object_prefix": "a\r\nHost: x"}, "'object_prefix' is"),
        ({"access_key_secret": 5}, "access_key_secret"),
    ],
)
def test_configurations_that_cannot_be_used(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=f"backend s3.*{says}") as caught:
        make_backend("s3", fake(**wrong))
    assert "SECRETWORD" not in str(caught.value)
