"""What the API offers: a table from path and method to an operation of the supervisor, and the shape of answers.

Pure; used by the API process. Clients written for the reference daemon look into the text of errors, so that keeps the
shape of its nested names: `Outer(Inner("text"))`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from nydusd.control.enrich import with_memory, with_states
from nydusd.control.exposition import CONTENT_TYPE
from nydusd.version import build_info

Json = dict[str, object]
_EMPTY: Final[Mapping[str, object]] = MappingProxyType({})


class Answer(NamedTuple):
    """A status and what goes into the body as JSON; None for no body."""

    status: int
    payload: object = None
    content_type: str = ""
    """Of a payload that is text as it is, not JSON."""


class Route(NamedTuple):
    """One method of one path."""

    op: str
    outer: str
    fixed: Mapping[str, object] = _EMPTY
    """What the operation is told beside the query and the body."""
    needs: tuple[str, ...] = ()
    """Parts of the query that must be there."""
    takes: tuple[str, ...] = ()
    """Parts of the query that may be there; None is passed on for an absent one."""
    any_of: tuple[str, ...] = ()
    """Parts of the query of which one must be there."""
    body: Callable[[bytes], Json] | None = None
    """Reads the body; None: there must not be one."""
    status: int = 200
    """Of success. 204 has no body."""
    shape: Callable[[Json], object] | None = None
    """Changes the supervisor's answer."""
    content_type: str = ""
    """What `shape` gives is text of this type."""
    patience: float | None = None
    """Seconds until a question to the supervisor counts as not answered (503), if it may take longer than others."""


class Call(NamedTuple):
    """What to ask the supervisor for."""

    route: Route
    message: Json


class Refused(Exception):
    """A request is answered with an error without asking the supervisor."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.answer = error_answer(status, text)


class Described(Refused):
    """The description of the API is asked for: no question for the supervisor either."""

    def __init__(self) -> None:
        Exception.__init__(self)
        text = Path(__file__).with_name("openapi.yaml").read_text()
        self.answer = Answer(200, text, "application/yaml")


def error_answer(status: int, text: str) -> Answer:
    """An error in the shape that clients know."""
    return Answer(status, {"code": "UNDEFINED", "message": text})


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, 'ParseBody(Error("the body is not JSON"))') from None


def _mount_command(body: bytes) -> Json:
    data = _json(body)
    if not isinstance(data, dict):
        raise Refused(400, 'ParseBody(Error("the body must be an object"))')
    found: Json = {}
    for name, default in (("source", None), ("fs_type", ""), ("config", None)):
        value = data.get(name, default)
        if not isinstance(value, str):
            raise Refused(400, f'ParseBody(Error("the body must have the text `{name}`"))')
        found[name] = value
    files = data.get("prefetch_files")
    if files is not None and not (isinstance(files, list) and all(isinstance(file, str) for file in files)):
        raise Refused(400, 'ParseBody(Error("`prefetch_files` must be a list of texts"))')
    return {**found, "prefetch_files": files}


def _settings(body: bytes) -> Json:
    data = _json(body)
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise Refused(400, 'ParseBody(Error("the body must be an object of texts"))')
    return {"values": data}


def _blob_entry(body: bytes) -> Json:
    data = _json(body)
    if not isinstance(data, dict):
        raise Refused(400, 'ParseBody(Error("the body must be an object"))')
    for name in ("type", "id"):
        if not isinstance(data.get(name), str):
            raise Refused(400, f'ParseBody(Error("the body must have the text `{name}`"))')
    for name in ("config", "config_v2"):
        if data.get(name) is not None and not isinstance(data[name], dict):
            raise Refused(400, f'ParseBody(Error("`{name}` must be an object"))')
    if data.get("config") is None and data.get("config_v2") is None:
        raise Refused(400, "BadRequest")
    return {"entry": data}


def _log_level(body: bytes) -> Json:
    data = _json(body)
    level = data.get("log_level") if isinstance(data, dict) else None
    if not isinstance(level, str):
        raise Refused(400, 'ParseBody(Error("the body must be an object with the text `log_level`"))')
    if level.lower() not in ("off", "error", "warn", "info", "debug", "trace"):
        raise Refused(500, "Configure(ResponsePayloadType)")
    return {"log_level": level.lower()}


def _gc_order(body: bytes) -> Json:
    """A JSON object with, perhaps, `target`: the bytes that a cache folder may still take afterwards."""
    data = _json(body)
    if not isinstance(data, dict):
        raise Refused(400, 'ParseBody(Error("the body must be an object"))')
    target = data.get("target")
    if target is not None and (not isinstance(target, int) or isinstance(target, bool) or target < 0):
        raise Refused(400, 'ParseBody(Error("target must be a number of bytes"))')
    return {"target": target}


def _scale(body: bytes) -> Json:
    data = _json(body)
    if not isinstance(data, dict):
        raise Refused(400, 'ParseBody(Error("the body must be an object: numbers of workers by role"))')
    return {"wanted": data}


def _with_version(info: Json) -> Json:
    return {"version": build_info(), **info}


def _v2_info(info: Json) -> Json:
    return {**_with_version(info), "backend_collection": None}


def _files(tables: Json) -> object:
    """The counts of each file, read here: the supervisor has no time for a hundred thousand rows."""
    from nydusd.ipc import file_counters

    names = tables["tables"]
    assert isinstance(names, list)
    if tables["told"] == "true":
        return file_counters.latest(names) if tables["latest"] else []
    return file_counters.files(names) if tables["files"] else {}


def _pattern(tables: Json) -> object:
    from nydusd.ipc import file_counters

    names = tables["tables"]
    assert isinstance(names, list)
    return file_counters.pattern(names) if tables["pattern"] else []


_IMAGE_PATIENCE: Final = 60.0
"""Seconds until what is done to an image counts as not answered: a worker reads its metadata, or the kernel mounts it."""
UPGRADE_PATIENCE: Final = 120.0
"""Seconds until an upgrade of the workers counts as not answered."""


def _mounting(op: str) -> Route:
    return Route(op, "Mount", needs=("mountpoint",), body=_mount_command, status=204, patience=_IMAGE_PATIENCE)


_BLOB = ("domain_id", "blob_id")
_SET_LOG_LEVEL = Route("set_log_level", "Configure", body=_log_level, status=204)


def _metrics_page(facts: Json) -> str:
    from nydusd.control.metrics import page  # only where somebody scrapes

    return page(facts)


_PROMETHEUS = Route("prometheus", "GlobalMetrics", shape=_metrics_page, content_type=CONTENT_TYPE)

METRICS_PATHS: Final = ("/metrics", "/metrics/prometheus", "/api/v1/metrics/prometheus")
"""All that the TCP port for metrics serves."""
DESCRIPTION: Final = "/api/openapi.yaml"

ROUTES: Final[dict[str, dict[str, Route]]] = {
    "/api/v1/daemon": {
        "GET": Route("daemon", "DaemonInfo", fixed={"api": 1}, shape=_with_version),
        "PUT": _SET_LOG_LEVEL,
    },
    "/api/v2/daemon": {
        "GET": Route("daemon", "DaemonInfo", fixed={"api": 2}, shape=_v2_info),
        "PUT": _SET_LOG_LEVEL,
    },
    "/api/v1/daemon/events": {"GET": Route("events", "Events")},
    "/api/v1/daemon/backend": {"GET": Route("backend", "FsBackendInfo", needs=("mountpoint",))},
    "/api/v1/daemon/start": {"PUT": Route("start", "Configure", status=204)},
    "/api/v1/daemon/exit": {"PUT": Route("exit", "Configure", status=204)},
    "/api/v1/daemon/fuse/sendfd": {"PUT": Route("sendfd", "Upgrade", status=204)},
    "/api/v1/daemon/fuse/takeover": {"PUT": Route("takeover", "Upgrade", status=204)},
    "/api/v1/mount": {
        "POST": _mounting("mount"),
        "PUT": _mounting("remount"),
        "DELETE": Route("umount", "Mount", needs=("mountpoint",), status=204, patience=_IMAGE_PATIENCE),
    },
    "/api/v1/metrics": {"GET": Route("metrics", "GlobalMetrics", takes=("id",))},
    "/api/v1/metrics/backend": {"GET": Route("metrics_backend", "BackendMetrics", takes=("id",))},
    "/api/v1/metrics/blobcache": {"GET": Route("metrics_blobcache", "BlobcacheMetrics", takes=("id",))},
    "/api/v1/metrics/files": {"GET": Route("metrics_tables", "FsFilesMetrics", takes=("id", "latest"), shape=_files)},
    "/api/v1/metrics/pattern": {"GET": Route("metrics_tables", "Pattern", takes=("id",), shape=_pattern)},
    "/api/v1/metrics/inflight": {"GET": Route("metrics_inflight", "InflightMetrics")},
    "/api/v1/config": {
        "GET": Route("get_config", "Configure", takes=("id",)),
        "PUT": Route("set_config", "Configure", takes=("id",), body=_settings, status=204),
    },
    "/api/v2/blobs": {
        "GET": Route("list_blobs", "GetBlobObjects", takes=_BLOB, any_of=("domain_id",)),
        "PUT": Route("bind_blob", "CreateBlobObject", body=_blob_entry, status=204, patience=_IMAGE_PATIENCE),
        "DELETE": Route("delete_blob", "DeleteBlobObject", takes=_BLOB, any_of=_BLOB, status=204),
    },
    **{path: {"GET": _PROMETHEUS} for path in METRICS_PATHS},
    "/api/v1/nydusd/cache": {"GET": Route("cache", "BlobcacheMetrics")},
    "/api/v1/nydusd/chunks": {"GET": Route("chunks", "BlobcacheMetrics", takes=("blob_id",), shape=with_states)},
    "/api/v1/nydusd/load": {"GET": Route("load", "GlobalMetrics")},
    "/api/v1/nydusd/mounts": {"GET": Route("mounts", "DaemonInfo")},
    "/api/v1/nydusd/quota": {
        "GET": Route("quota", "BlobcacheMetrics"),
        "PUT": Route("gc", "BlobcacheMetrics", body=_gc_order),
    },
    "/api/v1/nydusd/trace": {"GET": Route("trace", "Pattern", takes=("mountpoint",))},
    "/api/v1/nydusd/workers": {
        "GET": Route("workers", "GlobalMetrics", shape=with_memory),
        "PUT": Route("scale_workers", "Configure", body=_scale),
    },
    "/api/v1/nydusd/workers/upgrade": {"PUT": Route("upgrade_workers", "Upgrade", patience=UPGRADE_PATIENCE)},
}


def resolve(method: str, target: str, body: bytes, paths: Collection[str] = ()) -> Call:
    """The operation that a request asks for, with `paths` one at these paths only.

    Raises `Refused` with the answer if it asks for none.
    """
    if method not in ("GET", "PUT", "POST", "DELETE"):
        raise Refused(400, "BadRequest")
    try:
        url = urlsplit(target)
        # 64 parts at most: dict and list building for a hostile query stay small.
        query = dict(reversed(parse_qsl(url.query, keep_blank_values=True, max_num_fields=64)))
    except ValueError:
        raise Refused(400, "BadRequest") from None
    if url.path == DESCRIPTION and method == "GET" and not body and not paths:
        raise Described
    methods = ROUTES.get(url.path) if not paths or url.path in paths else None
    if methods is None:
        raise Refused(404, "NoRoute")
    route = methods.get(method)
    if route is None:
        raise Refused(400, "BadRequest")
    if (route.body is None) == bool(body):
        raise Refused(400, "BadRequest")
    message: Json = {"op": route.op, **route.fixed}
    for name in route.needs:
        if name not in query:
            raise Refused(400, f"QueryString(\"'{name}' should be specified in query string\")")
        message[name] = query[name]
    if route.any_of and not any(name in query for name in route.any_of):
        raise Refused(400, "BadRequest")
    for name in route.takes:
        message[name] = query.get(name)
    if route.body is not None:
        message.update(route.body(body))
    return Call(route, message)


def answer(route: Route, reply: Json) -> Answer:
    """The answer to a client from the supervisor's `{"ok": ...}` or `{"error": {"status", "message"}}`."""
    error = reply.get("error")
    if isinstance(error, dict):
        status = error.get("status")
        if not isinstance(status, int) or not 400 <= status < 600:
            status = 500
        if status == 404 and (route.outer.endswith("Metrics") or route.outer == "Pattern"):
            return error_answer(404, f"{route.outer}(Metrics(Stats(NoCounter)))")
        return error_answer(status, _nested(route.outer, str(error.get("message", ""))))
    if "ok" not in reply:
        return error_answer(500, _nested(route.outer, "the supervisor gave neither a result nor an error"))
    if route.status == 204:
        return Answer(204)
    result = reply["ok"]
    if result is None:
        return Answer(204)
    if route.shape is not None and isinstance(result, dict):
        result = route.shape(result)
    return Answer(route.status, result, route.content_type)


_INNER = re.compile(r"(DaemonAbnormal|MountFilesystem|Metrics)\(.*\)|ResponsePayloadType", re.DOTALL)
_KIND = re.compile(r"(Other|Serde|UnexpectedEvent|UpgradeManager)\(.*\)|NotReady|Unsupported", re.DOTALL)


def _nested(outer: str, message: str) -> str:
    """`message` inside the names that clients expect around it, as far as the supervisor did not give them."""
    if message.startswith(f"{outer}("):
        return message
    if _INNER.fullmatch(message):
        return f"{outer}({message})"
    if not _KIND.fullmatch(message):
        message = f"Other({json.dumps(message, ensure_ascii=False)})"
    if outer.endswith("Metrics") or outer in ("FsBackendInfo", "Pattern"):
        return f"{outer}(Metrics(Daemon({message})))"
    return f"{outer}(DaemonAbnormal({message}))"
