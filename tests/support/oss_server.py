"""A server of OSS buckets whose signature check is Alibaba's own library: it signs each request again and compares."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from types import SimpleNamespace
from urllib.parse import unquote

from alibabacloud_oss_v2.credentials import Credentials  # type: ignore[import-untyped]
from alibabacloud_oss_v2.signer import SignerV1  # type: ignore[import-untyped]
from alibabacloud_oss_v2.types import SigningContext  # type: ignore[import-untyped]
from requests.structures import CaseInsensitiveDict

from tests.support.object_server import Asked, ObjectServer, Reply, object_server

DOMAIN = "oss.test"
BUCKET = "images"
KEY_ID = "LTAItests"
SECRET = "s3cret-of-the-tests"
MAX_SKEW = 15 * 60


def expected(method: str, bucket: str, key: str, headers: Mapping[str, str], key_id: str, secret: str) -> str:
    """The Authorization that Alibaba's library gives to a request with these headers; Date is one of them."""
    request = SimpleNamespace(method=method, url="http://host/", headers=CaseInsensitiveDict(headers))
    context = SigningContext(
        product="oss",
        bucket=bucket,
        key=key,
        request=request,
        credentials=Credentials(key_id, secret),
        signing_time=parsedate_to_datetime(headers["date"]),
    )
    SignerV1().sign(context)
    return str(request.headers["Authorization"])


class _Guard:
    """Lets pass what is signed by `keys` (a secret by key id), and at the right time."""

    server: ObjectServer

    def __init__(self, public: bool) -> None:
        self.public = public
        self.keys = {KEY_ID: SECRET}
        self.token = ""

    def __call__(self, asked: Asked) -> Reply | None:
        given = asked.headers.get("authorization")
        if given is None and self.public:
            return None
        key_id = (given or "").removeprefix("OSS ").partition(":")[0]
        if given is None or key_id not in self.keys:
            return _refused("AccessDenied" if given is None else "InvalidAccessKeyId")
        if asked.headers.get("x-oss-security-token", "") != self.token:
            return _refused("InvalidSecurityToken")
        if abs(parsedate_to_datetime(asked.headers["date"]).timestamp() - self.server.now()) > MAX_SKEW:
            return _refused("RequestTimeTooSkewed")
        bucket = asked.headers["host"].partition(".")[0]
        wanted = expected(asked.method, bucket, unquote(asked.path[1:]), asked.headers, key_id, self.keys[key_id])
        return None if hmac.compare_digest(wanted, given) else _refused("SignatureDoesNotMatch")


def _refused(code: str) -> Reply:
    return Reply(403, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


class OssServer:
    """A running server: what it has, what it lets pass, and the configuration for it."""

    def __init__(self, server: ObjectServer, guard: _Guard) -> None:
        self.server = server
        self.keys = guard.keys
        self._guard = guard

    def only_with(self, key_id: str, secret: str, token: str = "") -> None:
        """From now on these are the only keys."""
        self.keys.clear()
        self.keys[key_id] = secret
        self._guard.token = token

    def config(self, **more: object) -> dict[str, object]:
        """The table `backend.oss` for this server. Its names need `names_are_local(DOMAIN)`."""
        return {
            "scheme": "http",
            "endpoint": f"{DOMAIN}:{self.server.address.rpartition(':')[2]}",
            "bucket_name": BUCKET,
            "access_key_id": KEY_ID,
            "access_key_secret": SECRET,
            **more,
        }


@contextlib.contextmanager
def oss_server(objects: Mapping[str, bytes], public: bool = False) -> Iterator[OssServer]:
    """Serve a bucket with `objects` by key. A public one can also be read without a signature."""
    guard = _Guard(public)
    with object_server({f"//{BUCKET}.{DOMAIN}/{key}": data for key, data in objects.items()}, guard) as server:
        guard.server = server
        yield OssServer(server, guard)
