"""Blobs that are objects in S3, or in what speaks its protocol. Run by fetch workers.

Requests are signed by AWS Signature Version 4, or not at all where no key is configured. A bucket that is in another
region than the configuration says is found there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import ClassVar

from nydusd.config.model import S3
from nydusd.errors import ConfigError
from nydusd.storage.backend.http.answer import Answer
from nydusd.storage.backend.http.store import SharedStore
from nydusd.storage.backend.object_store import ObjectStore
from nydusd.storage.backend.sigv4 import quote_path, sign
from nydusd.storage.backend.table import read_table, with_store

log = logging.getLogger(__name__)

_AWS = "s3.amazonaws.com"
_AWS_HOST = re.compile(r"(s3(?:-fips)?(?:\.dualstack)?)[.-](?:[a-z0-9-]+\.)?amazonaws\.com(\.cn)?")
_REGION = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_REGION_IN_BODY = re.compile(rb"<Region>([A-Za-z0-9_-]{1,64})</Region>")
_REGION_HEADER = "x-amz-bucket-region"


class S3Backend(ObjectStore):
    """A bucket of S3. Blob `<id>` is the object `object_prefix` + `<id>`."""

    KIND: ClassVar[str] = "s3"

    def __init__(self, table: S3, store: SharedStore) -> None:
        if not _REGION.fullmatch(table.region):
            raise ConfigError(f"backend s3: 'region' is {table.region[:100]!r}; A-Z a-z 0-9 _ - are allowed")
        if table.virtual_host and "_" in table.bucket_name:
            raise ConfigError(
                "backend s3: 'virtual_host' is set, but 'bucket_name' has a '_' and cannot be a host's name"
            )
        super().__init__(table, table.endpoint or _AWS, store)
        self._region = table.region
        self._virtual_host = table.virtual_host

    @classmethod
    def from_config(cls, config: Mapping[str, object], shared_fd: int = -1) -> S3Backend:
        """Take the table `backend.s3` in its plain form. Raises `ConfigError`."""
        table = read_table(cls.KIND, config, S3)
        return with_store(lambda store: cls(table, store), shared_fd)

    def blob_url(self, blob_id: str) -> str:
        key = quote_path(self._prefix + blob_id)
        if self._virtual_host:
            return f"{self._scheme}://{self._bucket.lower()}.{self._endpoint}/{key}"
        return f"{self._scheme}://{self._endpoint}/{self._bucket}/{key}"

    def authorize(self, method: str, url: str, headers: dict[str, str]) -> None:
        if keys := self._keys():
            headers.update(sign(keys, self._region, method, url, headers, self._now()))

    def takes_redirect(self, answer: Answer, target: str) -> str:
        """Redirects to another region need another signature, so they are not followed; see `remedy`."""
        return "" if answer.headers.get(_REGION_HEADER) else super().takes_redirect(answer, target)

    def remedy(self, answer: Answer, tried: int) -> bool:
        return self._learn_region(answer) or super().remedy(answer, tried)

    def _learn_region(self, answer: Answer) -> bool:
        """Whether the answer names a region that we did not know of. Only in hosts of AWS the region is a part."""
        if answer.status not in (301, 302, 307, 308, 400, 403):
            return False
        region = answer.headers.get(_REGION_HEADER, "")
        if not region and answer.status == 400:
            match = _REGION_IN_BODY.search(answer.peek())
            region = match[1].decode() if match else ""
        if not _REGION.fullmatch(region) or region == self._region:
            return False
        log.warning("s3: bucket %s is in region %s, not in %s", self._bucket, region, self._region)
        self._region = region
        if host := _AWS_HOST.fullmatch(self._endpoint):
            self._endpoint = f"{host[1]}.{region.lower()}.amazonaws.com{host[2] or ''}"
        return True
