"""Faults of a registry as a reader of the mount meets them: what is read, what the log says, and that nothing wrong is kept.

One daemon meets most of them, one after the other, each with files that nobody has read before. `docs/faults.md` is the table.
"""

from __future__ import annotations

import errno
import gzip
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support.discipline import wait_until
from tests.support.fault_table import MOUNTED, rows_of
from tests.support.faulty_server import Faulty, Reply, Request, faulty, part_of
from tests.support.mounted import AUTH, PASSWORD, TOKEN, Hub, Mounted, Step, Tree

PAGE = b"<html><body>" + b"Sorry, something went wrong. " * 4000 + b"</body></html>"
HALF = 30_000
"""Bytes of a body after which something happens: fewer than a chunk has."""


@dataclass(frozen=True)
class Fault:
    """What the registry does: `steps` with the next requests, or `always` for as long as the fault lasts.

    `says` is what the log says of it behind blob and host, empty where it says nothing. `prepare` is called before.
    `place` is where in the blob: -1 at its start, 1 behind its first MiB.
    """

    says: str = ""
    steps: Callable[[Hub], list[Step]] = lambda hub: []
    always: Callable[[Hub], Step | None] = lambda hub: None
    prepare: Callable[[Hub], None] = lambda hub: None
    place: int = 0


def forget_tokens(status: int) -> Callable[[Hub], None]:
    def prepare(hub: Hub) -> None:
        hub.good.clear()
        hub.refusal = status

    return prepare


def once(step: Step) -> Callable[[Hub], list[Step]]:
    return lambda hub: [step]


def lasting(step: Step) -> Callable[[Hub], Step | None]:
    return lambda hub: step


def part(**fields: object) -> Callable[[Hub], list[Step]]:
    """The right answer, ended, delayed or cut as the fields say."""
    return lambda hub: [lambda request: part_of(hub.tree.data, request, **fields)]


def with_headers(headers: Callable[[Request, int], dict[str, str]]) -> Callable[[Hub], list[Step]]:
    """206 with the right bytes under wrong headers."""

    def steps(hub: Hub) -> list[Step]:
        right = hub.part
        return [lambda request: Reply(206, headers(request, len(hub.tree.data)), right(request).body)]

    return steps


def first_of(request: Request) -> int:
    assert request.range is not None
    return request.range[0]


def whole(hub: Hub) -> Reply:
    return Reply(200, {"Content-Type": "application/octet-stream"}, hub.tree.data)


def wrong(hub: Hub) -> Step:
    def handler(request: Request) -> Reply:
        right = part_of(hub.tree.data, request)
        return Reply(right.status, right.headers, bytes(byte ^ 0xFF for byte in right.body))

    return handler


FAULTS = {
    "401, the token has ended": Fault("status 401(?=.*asked again)", prepare=forget_tokens(401)),
    "403, the token has ended": Fault("status 403(?=.*asked again)", prepare=forget_tokens(403)),
    "401 for ever": Fault("status 401, credentials are missing", always=lasting(Reply(401))),
    "403 for ever": Fault("status 403, credentials are missing", always=lasting(Reply(403))),
    "404": Fault("status 404, it has no such blob", always=lasting(Reply(404, {}, PAGE))),
    "416": Fault("status 416, the stored blob is shorter", always=lasting(Reply(416, {"Content-Range": "bytes */5"}))),
    "429 with Retry-After": Fault("status 429", once(Reply(429, {"Retry-After": "1"}))),
    "500": Fault("status 500", once(Reply(500))),
    "503": Fault("status 503", once(Reply(503, {}, PAGE))),
    "503 with Retry-After": Fault("status 503", once(Reply(503, {"Retry-After": "1"}))),
    "500 for ever": Fault("status 500", always=lasting(Reply(500))),
    "reset before the answer": Fault("the connection broke", once(Reply(silent=True, reset=True))),
    "reset in mid-body": Fault("the connection broke in the body", part(cut=HALF, reset=True)),
    "body shorter than its right Content-Length": Fault("the body is shorter than it should be", part(cut=HALF)),
    "200 with the whole blob, near its start": Fault("", lambda hub: [whole(hub)], place=-1),
    "200 with the whole blob, behind 1 MiB": Fault("it sends the whole blob where a part is asked for", always=whole),
    "wrong Content-Range": Fault(
        "wrong answer: Content-Range 'bytes 0-",
        with_headers(lambda request, size: {"Content-Range": f"bytes 0-65535/{size}"}),
        place=1,
    ),
    "206 without Content-Range": Fault("wrong answer: Content-Range ''", with_headers(lambda request, size: {})),
    "gzip'd answer": Fault(
        "wrong answer: a body in encoding 'gzip'",
        lambda hub: [
            lambda request: Reply(
                206,
                {"Content-Encoding": "gzip", **part_of(hub.tree.data, request).headers},
                gzip.compress(part_of(hub.tree.data, request).body, 1),
            )
        ],
    ),
    "page with status 200": Fault(
        "wrong answer: a page instead of the blob", once(Reply(200, {"Content-Type": "text/html"}, PAGE))
    ),
    "stalled body": Fault("the body stalled", part(stall=HALF)),
    "slow start, within `timeout`": Fault("", part(delay=0.3)),
    "slow start, beyond `timeout`": Fault("no answer in time", part(delay=1.5)),
    "slow body that moves": Fault("", part(pieces=HALF, pace=0.6)),
    "expired redirect": Fault("status 403.*by a remembered redirect; another way is tried"),
    "wrong bytes": Fault("chunk", lambda hub: [wrong(hub)]),
    "wrong bytes for ever": Fault("chunk", always=wrong),
    "each connection closed": Fault("", part(close=True)),
}
"""By their names in docs/faults.md."""
FILES = 3
"""For each fault: what is read while it lasts, and before and after it."""
ORDER = sorted(FAULTS, key=lambda name: FAULTS[name].place)
"""In this order they lie in the blob."""


def file_of(name: str, number: int = 0) -> str:
    return f"{ORDER.index(name):02}-{number}"


NAMES = [file_of(name, number) for name in ORDER for number in range(FILES)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(NAMES, tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    with faulty() as server:
        yield server


@pytest.fixture(scope="module")
def hub(tree: Tree, server: Faulty) -> Hub:
    return Hub(tree, server)


@pytest.fixture(scope="module")
def mounted(tree: Tree, hub: Hub) -> Iterator[Mounted]:
    with Mounted(tree, {"host": hub.server.host}, tuning={"read_deadline": 4.0}) as mounted:
        assert mounted.is_right(file_of("404", 1)), "so that the blob is open"
        yield mounted
        secrets = [secret for secret in (PASSWORD, AUTH, TOKEN) if secret in mounted.log()]
        assert not secrets, "they were written to the log"


@pytest.fixture(autouse=True)
def _connections_end_with_the_test(server: Faulty) -> Iterator[None]:
    yield
    server.cut()


def test_the_table_names_these_faults() -> None:
    assert rows_of(MOUNTED) == list(FAULTS)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "expired redirect"])
def test_a_fault_and_its_end(mounted: Mounted, hub: Hub, expect_log: Callable[..., None], name: str) -> None:
    fault = FAULTS[name]
    before = len(mounted.log())
    fault.prepare(hub)
    hub.steps, hub.always = fault.steps(hub), fault.always(hub)
    if hub.always is not None:
        expect_log(rf"ERROR .*(blob {mounted.tree.blob_id}|a read failed)")
        assert mounted.read(file_of(name)) == errno.EIO
        hub.always = None
        wait_until(lambda: mounted.is_right(file_of(name)), f"the end of {name}")
    else:
        assert mounted.is_right(file_of(name))
        assert not hub.steps, "the fault did not happen"
    hub.refusal = 401
    said = mounted.log()[before:]
    if fault.says == "chunk":
        assert re.search(rf"blob {mounted.tree.blob_id} chunk \d+: .*digest", said)
    elif fault.says:
        assert mounted.line(hub.server.host, fault.says).search(said), said
    else:
        assert "WARN" not in said and "ERROR" not in said
    assert mounted.wrong_in_cache() == []


def test_an_expired_redirect_is_asked_for_anew(mounted: Mounted, hub: Hub) -> None:
    with faulty() as store:
        for path in ("/old", "/new"):
            store.handlers[path] = hub.part
        signature = "X-Amz-Signature=0123456789abcdef"

        def redirect(to: str) -> Reply:
            return Reply(307, {"Location": f"{store.url}/{to}?{signature}"})

        hub.always = redirect("old")
        assert mounted.is_right(file_of("expired redirect", 0))
        store.program("/old", Reply(403))
        hub.always = redirect("new")
        before = len(mounted.log())
        assert mounted.is_right(file_of("expired redirect", 1))
        assert store.count("/old") >= 2 and store.count("/new") >= 1
        for request in store.requests:
            assert "authorization" not in request.headers
    hub.always = None
    said = mounted.log()[before:]
    assert re.search(
        rf"blob {mounted.tree.blob_id}: {re.escape(store.host)}: status 403.*\(attempt 1\), by a remembered", said
    )
    assert signature not in mounted.log()
    assert mounted.is_right(file_of("expired redirect", 2)), "the object store is gone: the registry is asked"


def test_what_was_read_is_read_again_without_the_registry(mounted: Mounted, hub: Hub) -> None:
    done = [name for name in NAMES if name.endswith("-0") and mounted.is_right(name)]
    assert done
    hub.always = Reply(500)
    before = hub.server.count(hub.path)
    assert all(mounted.is_right(name) for name in done)
    assert hub.server.count(hub.path) == before
    hub.always = None


def test_what_is_cached_is_read_while_readers_wait_for_a_silent_registry(mounted: Mounted, hub: Hub) -> None:
    """The registry holds its answers until the cached file was read: no reader of that waits behind those."""
    cached = file_of("404", 1)
    assert mounted.is_right(cached)
    read = threading.Event()

    def hold(request: Request) -> Reply:
        read.wait(30)
        return hub.part(request)

    hub.always = hold
    waiting = [file_of(name, 2) for name in ORDER[:6]]
    before = hub.server.count(hub.path)
    threads = [threading.Thread(target=mounted.read, args=(name,)) for name in waiting]
    for thread in threads:
        thread.start()
    wait_until(lambda: hub.server.count(hub.path) > before, "the registry to be asked")
    try:
        for _ in range(20):
            assert mounted.is_right(cached)
        assert all(thread.is_alive() for thread in threads)
    finally:
        hub.always = None
        read.set()
        for thread in threads:
            thread.join()
    assert all(mounted.is_right(name) for name in waiting)


def test_readers_of_one_slow_chunk_are_one_download(mounted: Mounted, hub: Hub) -> None:
    hub.always = part(pieces=HALF, pace=0.3)(hub)[0]
    before = hub.server.count(hub.path)
    found: list[bool] = []
    name = file_of("500", 1)
    threads = [threading.Thread(target=lambda: found.append(mounted.is_right(name))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hub.always = None
    assert found == [True] * 8
    assert hub.server.count(hub.path) == before + 1


def test_readers_of_one_failing_chunk_share_its_failure(
    mounted: Mounted, hub: Hub, expect_log: Callable[..., None]
) -> None:
    expect_log(rf"ERROR .*(blob {mounted.tree.blob_id}|a read failed)")
    hub.always = Reply(500)
    before = hub.server.count(hub.path)
    found: list[bytes | int] = []
    name = file_of("503", 1)
    threads = [threading.Thread(target=lambda: found.append(mounted.read(name))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = hub.server.count(hub.path) - before
    hub.always = None
    assert found == [errno.EIO] * 8
    assert asked <= 4 + 6, "one read with its retries, then one request in each pause of 0.1 to 4 s, until the deadline"
    wait_until(lambda: mounted.is_right(name), "the end of the fault")
