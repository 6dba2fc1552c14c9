"""AWS's own library as an oracle: an S3 client, and its signatures for requests of ours."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, Protocol
from unittest import mock

import botocore.auth  # type: ignore[import-untyped]
import botocore.awsrequest  # type: ignore[import-untyped]
import botocore.config  # type: ignore[import-untyped]
import botocore.credentials  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]


class S3Client(Protocol):
    """What the tests use of an S3 client."""

    def create_bucket(self, *, Bucket: str, CreateBucketConfiguration: Mapping[str, str]) -> Any: ...
    def put_object(self, *, Bucket: str, Key: str, Body: bytes) -> Any: ...
    def close(self) -> None: ...


def s3(url: str, region: str, key_id: str, secret: str) -> S3Client:
    """A client that sends everything to `url`, path style, and never tries twice."""
    client: S3Client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=url,
        region_name=region,
        aws_access_key_id=key_id,
        aws_secret_access_key=secret,
        config=botocore.config.Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )
    return client


def signed_headers(
    method: str, url: str, headers: Mapping[str, str], region: str, key_id: str, secret: str, token: str, now: float
) -> dict[str, str]:
    """All headers of a request as botocore signs it at the time `now`."""
    request = botocore.awsrequest.AWSRequest(method=method, url=url, headers=dict(headers))
    credentials = botocore.credentials.Credentials(key_id, secret, token or None)
    when = datetime.datetime.fromtimestamp(now, datetime.UTC)
    with mock.patch("botocore.auth.get_current_datetime", return_value=when.replace(tzinfo=None)):
        botocore.auth.S3SigV4Auth(credentials, "s3", region).add_auth(request)
    return {name.lower(): value for name, value in request.headers.items()}


def seconds(stamp: str) -> float:
    """The time in an X-Amz-Date header."""
    return datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%S%z").timestamp()
