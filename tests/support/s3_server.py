"""A running OpenStack Swift with its S3 API, and a bucket in it that is filled through botocore."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support import botocore_client

REGION = "eu-test-1"
KEY_ID = "test:tester"
SECRET = "s3cret-of-the-tests"
BUCKET = "images"
DOMAIN = "s3.localhost"
"""Buckets are hosts below this name, too. Every name below localhost is this machine."""


@dataclass(frozen=True)
class S3Server:
    """Where the server listens."""

    port: int

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def config(self, **more: object) -> dict[str, object]:
        """The table `backend.s3` for this server."""
        return {
            "scheme": "http",
            "endpoint": self.endpoint,
            "region": REGION,
            "bucket_name": BUCKET,
            "access_key_id": KEY_ID,
            "access_key_secret": SECRET,
            **more,
        }

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Store objects, through an S3 client that is not ours."""
        client = botocore_client.s3(f"http://{self.endpoint}", REGION, KEY_ID, SECRET)
        try:
            for key, data in objects.items():
                client.put_object(Bucket=BUCKET, Key=key, Body=data)
        finally:
            client.close()


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start Swift below `folder` and make the bucket."""
    script = Path(__file__).with_name("swift_service.py")
    command = [sys.executable, "-P", str(script), str(folder), REGION, DOMAIN, KEY_ID, SECRET]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "PYTHONDEVMODE")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin and process.stdout
        try:
            port = process.stdout.readline()
            assert port.strip().isdecimal(), "Swift did not start"
            client = botocore_client.s3(f"http://127.0.0.1:{int(port)}", REGION, KEY_ID, SECRET)
            client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
            client.close()
            yield S3Server(int(port))
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
