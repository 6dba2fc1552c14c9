"""A daemon on an image whose blob comes from a registry of a test's own, with a token server and an object store beside it."""

from __future__ import annotations

import base64
import json
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.image import build
from tests.support.daemon import Daemon
from tests.support.discipline import discipline
from tests.support.faulty_server import Faulty, Handler, Reply, Request, part_of

CHUNK = 64 << 10
PASSWORD = "correct-horse-battery"
AUTH = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
TOKEN = "token-of-the-tests-"
REPO = "shop/frontend"
Step = Reply | Handler


class Tree:
    """An image of files that are one incompressible chunk each, or `chunks`; `contents` by name."""

    def __init__(self, names: Sequence[str], folder: Path, chunks: int = 1) -> None:
        source = random.Random(5)
        tree = folder / "tree"
        tree.mkdir(parents=True)
        self.contents = {name: source.randbytes(chunks * CHUNK) for name in names}
        for name, content in self.contents.items():
            (tree / name).parent.mkdir(exist_ok=True)
            (tree / name).write_bytes(content)
        built = build(tree, folder / "image", CHUNK, plain=folder / "plain")
        self.bootstrap = built.bootstrap
        self.blob_id = built.blob.name
        self.data = built.blob.read_bytes()
        self.plain = (folder / "plain" / f"{self.blob_id}.blob.data").read_bytes()


class Hub:
    """The registry. `steps` are the next answers to requests for the blob, `always` all those after them (None: the blob).

    `good` are the tokens that it takes; `refusal` is how it refuses others. `users` may have tokens. `open_to_all` needs none.
    """

    def __init__(self, tree: Tree, server: Faulty) -> None:
        self.tree = tree
        self.server = server
        self.path = f"/v2/{REPO}/blobs/sha256:{tree.blob_id}"
        self.steps: list[Step] = []
        self.always: Step | None = None
        self.good: set[str] = set()
        self.users = {AUTH}
        self.open_to_all = False
        self.refusal = 401
        self.given = 0
        server.handlers[self.path] = self._blob
        server.handlers["/token"] = self.token

    def part(self, request: Request) -> Reply:
        """The right answer."""
        return part_of(self.tree.data, request)

    def _blob(self, request: Request) -> Reply:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token not in self.good and not self.open_to_all:
            challenge = f'Bearer realm="{self.server.url}/token",service="shop"'
            return Reply(self.refusal, {"WWW-Authenticate": challenge} if self.refusal == 401 else {})
        with self.server.lock:
            step = self.steps.pop(0) if self.steps else self.always
        if step is None:
            return self.part(request)
        return step if isinstance(step, Reply) else step(request)

    def token(self, request: Request) -> Reply:
        """The right answer of the token server."""
        if request.headers.get("authorization", "").removeprefix("Basic ") not in self.users:
            return Reply(401)
        with self.server.lock:
            self.given += 1
            token = f"{TOKEN}{self.given}"
            self.good.add(token)
        return Reply(200, {}, json.dumps({"token": token, "expires_in": 300}).encode())


class Mounted:
    """A `Daemon` on a `Tree` with a registry backend. `backend` goes over the keys that it has by default.

    `args` and `cache`: as of `Daemon`; nothing is stored if it is not to be `cached`.
    """

    def __init__(
        self,
        tree: Tree,
        backend: dict[str, object],
        *,
        kind: str = "registry",
        environment: dict[str, str] | None = None,
        tuning: dict[str, object] | None = None,
        verb: str = "fuse",
        args: tuple[str, ...] = (),
        cache: Path | None = None,
        cached: bool = True,
    ) -> None:
        self.tree = tree
        self._folder = Path(tempfile.mkdtemp(prefix="m", dir=discipline.folder))
        cache = cache or self._folder / "cache"
        common: dict[str, object] = {"timeout": 1, "connect_timeout": 1, "retry_limit": 3, "failure_memory": 0.2}
        if kind == "registry":
            common |= {"scheme": "http", "repo": REPO, "auth": AUTH}
        config: dict[str, object] = {
            "version": 2,
            "backend": {"type": kind, kind: common | backend},
            "cache": {"type": "blobcache", "filecache": {"work_dir": str(cache)}} if cached else {"type": "dummycache"},
            "rafs": {"mode": "direct", "batch_size": 0},
            # One of each: what one of them has learnt is known to all then, and faults come in the order of the reads.
            "nydusd": {"fetch_workers": 1, "decompress_workers": 1} | (tuning or {}),
        }
        # Credentials of the machine must not come into it, and its file is where new ones are put.
        self.docker = self._folder / "docker"
        self.docker.mkdir()
        known = {"DOCKER_CONFIG": str(self.docker)}
        self.daemon = Daemon(
            tree.bootstrap,
            self._folder,
            cache=cache,
            config=config,
            environment=known | (environment or {}),
            verb=verb,
            args=args,
        )

    def __enter__(self) -> Self:
        self.daemon.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.daemon.__exit__(kind, error, trace)

    def read(self, name: str) -> bytes | int:
        """The content of a file, or the errno of the first read of it that failed."""
        try:
            return (self.daemon.mountpoint / name).read_bytes()
        except OSError as error:
            assert error.errno is not None
            return error.errno

    def is_right(self, name: str, content: str = "") -> bool:
        """Whether a file can be read; AssertionError if that gives anything but what is in it (or in the file `content`)."""
        found = self.read(name)
        if isinstance(found, int):
            return False
        assert found == self.tree.contents[content or name], f"{name}: wrong bytes"
        return True

    def log(self) -> str:
        return self.daemon.log.read_text(errors="replace")

    def line(self, host: str, says: str) -> re.Pattern[str]:
        """A line that names blob, host and attempt."""
        return re.compile(rf"blob {self.tree.blob_id}: {re.escape(host)}: {says}.*\(attempt \d+\)")

    def wrong_in_cache(self) -> list[int]:
        """Offsets of the pages of the cache file that hold neither nothing nor what belongs there."""
        cached = (self.daemon.cache / f"{self.tree.blob_id}.blob.data").read_bytes()
        plain = self.tree.plain
        pages = range(0, len(cached), 4096)
        return [at for at in pages if any(cached[at : at + 4096]) and cached[at : at + 4096] != plain[at : at + 4096]]
