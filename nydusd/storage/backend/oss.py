"""Blobs that are objects in Alibaba Cloud OSS. Run by fetch workers.

Requests carry OSS's header signature, version 1, or none where no key is configured (public buckets).
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from email.utils import formatdate
from typing import ClassVar
from urllib.parse import unquote

from nydusd.config.model import Oss
from nydusd.storage.backend.http.store import SharedStore
from nydusd.storage.backend.keys import Keys
from nydusd.storage.backend.object_store import ObjectStore
from nydusd.storage.backend.sigv4 import quote_path
from nydusd.storage.backend.table import read_table, with_store


def sign_v1(keys: Keys, method: str, resource: str, headers: Mapping[str, str], now: float) -> dict[str, str]:
    """The headers that make a request without a body pass at OSS: Date, perhaps x-oss-security-token, Authorization.

    `resource` is `/bucket/object`, not percent-encoded. Of `headers` (what will be sent besides) the x-oss-* ones are
    signed; Range is not. `now` is the server's time in seconds since 1970.
    """
    added = {"Date": formatdate(now, usegmt=True)}
    if keys.session_token:
        added["x-oss-security-token"] = keys.session_token
    signed = {name.lower(): value.strip() for name, value in {**headers, **added}.items()}
    own = "".join(f"{name}:{signed[name]}\n" for name in sorted(signed) if name.startswith("x-oss-"))
    # The two empty lines are Content-MD5 and Content-Type.
    to_sign = f"{method}\n\n\n{added['Date']}\n{own}{resource}"
    signature = base64.b64encode(hmac.digest(keys.secret.encode(), to_sign.encode(), "sha1")).decode()
    added["Authorization"] = f"OSS {keys.key_id}:{signature}"
    return added


class OssBackend(ObjectStore):
    """A bucket of OSS. Blob `<id>` is the object `object_prefix` + `<id>`, at a host whose name begins with the bucket."""

    KIND: ClassVar[str] = "oss"

    def __init__(self, table: Oss, store: SharedStore) -> None:
        super().__init__(table, table.endpoint, store)
        self._base = f"{self._scheme}://{self._bucket}.{self._endpoint}/"

    @classmethod
    def from_config(cls, config: Mapping[str, object], shared_fd: int = -1) -> OssBackend:
        """Take the table `backend.oss` in its plain form. Raises `ConfigError`."""
        table = read_table(cls.KIND, config, Oss)
        return with_store(lambda store: cls(table, store), shared_fd)

    def blob_url(self, blob_id: str) -> str:
        return self._base + quote_path(self._prefix + blob_id)

    def authorize(self, method: str, url: str, headers: dict[str, str]) -> None:
        if keys := self._keys():
            resource = f"/{self._bucket}/{unquote(url.removeprefix(self._base))}"
            headers.update(sign_v1(keys, method, resource, headers, self._now()))
