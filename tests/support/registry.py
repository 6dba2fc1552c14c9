"""Debian's docker-registry on loopback, in the ways in which registries want to be asked; and a token server for it.

`scripts/need-registry` installs the program. Each registry has a folder and a process of its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import urllib3

from tests.support.certificates import Authority
from tests.support.discipline import becomes_true
from tests.support.faulty_server import Faulty, Reply, Request

USER = "user"
PASSWORD = "correct-horse"
AUTH = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
_HTPASSWD = f"{USER}:$2b$05$abcdefghijklmnopqrstuuZ0Fx87Pb/Aqb0E90lfvCwzXnaFKUHpS\n"


class TokenServer:
    """Gives tokens that docker-registry believes, to whom it knows. `life` is in seconds."""

    def __init__(self, authority: Authority, life: int = 300) -> None:
        self.life = life
        self.allowed = {f"Basic {AUTH}"}
        self.identities: set[str] = set()
        self.readers: set[str] = set()
        """Repositories whose images may only be read: a request for more gets nothing."""
        self.post = True
        self.server = Faulty()
        self.server.program("/token", self._answer)
        self.realm = f"{self.server.url}/token"
        self.authority = authority

    def _answer(self, request: Request) -> Reply:
        if request.method == "POST" and not self.post:
            return Reply(405)
        text = request.body.decode() if request.method == "POST" else urlsplit(request.path).query
        fields = {name: values[0] for name, values in parse_qs(text).items()}
        known = fields.get("grant_type") == "refresh_token" and fields.get("refresh_token") in self.identities
        kind, name, actions = fields["scope"].split(":")
        if not known and request.headers.get("authorization") not in self.allowed:
            return Reply(401, {}, b'{"errors": []}')
        if name in self.readers and actions != "pull":
            return Reply(403, {}, b'{"errors": [{"code": "DENIED"}]}')
        access: list[dict[str, object]] = [{"type": kind, "name": name, "actions": actions.split(",")}]
        token = self.token(fields["service"], access)
        return Reply(
            200, {"Content-Type": "application/json"}, json.dumps({"token": token, "expires_in": self.life}).encode()
        )

    def token(self, service: str, access: list[dict[str, object]]) -> str:
        """A signed token (JWT, ES256)."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, utils
        from cryptography.hazmat.primitives.serialization import Encoding

        now = int(time.time())
        chain = [base64.b64encode(self.authority.certificate.public_bytes(Encoding.DER)).decode()]
        header = {"typ": "JWT", "alg": "ES256", "x5c": chain}
        claims = {
            "iss": "nydusd-test",
            "sub": USER,
            "aud": service,
            "exp": now + self.life,
            "nbf": now - 60,
            "iat": now,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        signed = f"{_b64(json.dumps(header).encode())}.{_b64(json.dumps(claims).encode())}"
        r, s = utils.decode_dss_signature(self.authority.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def close(self) -> None:
        self.server.close()


class DockerRegistry:
    """One registry process. `auth` is empty, "htpasswd" or "token"."""

    def __init__(
        self, folder: Path, authority: Authority | None = None, auth: str = "", tokens: TokenServer | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.scheme = "https" if authority is not None and auth != "token" else "http"
        self.host = f"127.0.0.1:{_free_port()}"
        config: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": self.host, "secret": "test"},
        }
        if self.scheme == "https" and authority is not None:
            tls = {"certificate": str(authority.certificate_file), "key": str(authority.key_file)}
            config["http"] = {"addr": self.host, "secret": "test", "tls": tls}
        if auth == "htpasswd":
            (folder / "htpasswd").write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "shop", "path": str(folder / "htpasswd")}}
        if tokens is not None and authority is not None:
            config["auth"] = {
                "token": {
                    "realm": tokens.realm,
                    "service": "shop",
                    "issuer": "nydusd-test",
                    "rootcertbundle": str(authority.ca_file),
                }
            }
        (folder / "config.yml").write_text(json.dumps(config))
        self._folder = folder
        self._log = (folder / "log").open("wb")
        self.start()

    def start(self) -> None:
        """Start the process, at first and after `stop`."""
        self._process = subprocess.Popen(
            ["docker-registry", "serve", str(self._folder / "config.yml")], stdout=self._log, stderr=self._log
        )
        started = becomes_true(self._listens, 15.0)
        if not started:
            self.close()
            raise AssertionError(f"docker-registry did not start: {(self._folder / 'log').read_text()[-2000:]}")

    def push(self, repo: str, data: bytes, digest: str, headers: Mapping[str, str] | None = None) -> None:
        """Store a blob by the distribution API."""
        with _client() as manager:
            sent = dict(headers or {})
            begun = manager.request("POST", f"{self.scheme}://{self.host}/v2/{repo}/blobs/uploads/", headers=sent)
            assert begun.status == 202, begun.data
            place = begun.headers["Location"]
            url = f"{place}{'&' if '?' in place else '?'}digest=sha256:{digest}"
            done = manager.request("PUT", url, body=data, headers=sent)
            assert done.status == 201, done.data

    def push_manifest(
        self, repo: str, tag: str, media_type: str, manifest: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        """Store a manifest, whose blobs are there, under a tag."""
        with _client() as manager:
            url = f"{self.scheme}://{self.host}/v2/{repo}/manifests/{tag}"
            done = manager.request("PUT", url, body=manifest, headers={"Content-Type": media_type, **(headers or {})})
            assert done.status == 201, done.data

    def stop(self) -> None:
        """End the process and all its connections; nobody listens at its address then."""
        self._process.terminate()
        self._process.wait(10)

    def close(self) -> None:
        """End the process for good."""
        self.stop()
        self._log.close()

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            return True
        host, port = self.host.split(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return True
        return False


@contextlib.contextmanager
def _client() -> Iterator[urllib3.PoolManager]:
    """A client that closes its connections: the tests look for descriptors that are left."""
    urllib3.disable_warnings()
    manager = urllib3.PoolManager(cert_reqs="CERT_NONE", assert_hostname=False)
    try:
        yield manager
    finally:
        for key in manager.pools.keys():  # noqa: SIM118  (it cannot be iterated itself)
            pool = manager.pools.get(key)
            if pool is not None:
                pool.close()


@contextlib.contextmanager
def docker_registry(folder: Path, **options: object) -> Iterator[DockerRegistry]:
    """A registry for a `with` block."""
    registry = DockerRegistry(folder, **options)  # type: ignore[arg-type]
    try:
        yield registry
    finally:
        registry.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
