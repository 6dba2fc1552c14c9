"""A registry with its token server, and the credentials that it takes. None of them may be in a log line."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from tests.support.backends import REPO, Blob
from tests.support.faulty_server import Faulty, Reply, Request, part_of

BLOB = Blob(50_000)
SECRETS = ("correct-horse", "battery-staple")


def basic(password: str, user: str = "user") -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


OLD, NEW = basic(SECRETS[0]), basic(SECRETS[1])


class Hub:
    """A registry and its token server in one. Tokens are t1, t2, ...; `good` are those that it takes now."""

    def __init__(self, server: Faulty) -> None:
        self.server = server
        self.users = {OLD}
        self.good: set[str] = set()
        self.given = 0
        self.life: object = 300
        self.status = 401
        server.program(BLOB.path, self._blob)
        server.program("/token", self._token)

    def _blob(self, request: Request) -> Reply:
        if request.headers.get("authorization", "").removeprefix("Bearer ") in self.good:
            return part_of(BLOB.data, request)
        challenge = f'Bearer realm="{self.server.url}/token?a=b",service="the hub",scope="repository:{REPO}:pull"'
        return Reply(self.status, {"WWW-Authenticate": challenge} if self.status == 401 else {})

    def _token(self, request: Request) -> Reply:
        if request.headers.get("authorization", "").removeprefix("Basic ") not in self.users:
            return Reply(401)
        with self.server.lock:
            self.given += 1
            token = f"token-number-{self.given}"
            self.good.add(token)
        return Reply(200, {}, json.dumps({"access_token": token, "expires_in": self.life}).encode())

    @property
    def asked(self) -> int:
        return self.server.count("/token")


def docker_config(tmp_path: Path, config: object) -> None:
    folder = tmp_path / "docker"
    folder.mkdir(exist_ok=True)
    part = folder / "part"
    part.write_text(config if isinstance(config, str) else json.dumps(config))
    part.rename(folder / "config.json")
