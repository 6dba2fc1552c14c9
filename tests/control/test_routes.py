"""The table of the API and the shape of its answers, without a process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nydusd.control.routes import ROUTES, Answer, Call, Refused, answer, resolve
from nydusd.version import build_info


def ask(method: str, target: str, body: bytes = b"") -> dict[str, object]:
    return resolve(method, target, body).message


def refused(method: str, target: str, body: bytes = b"") -> tuple[int, str]:
    with pytest.raises(Refused) as error:
        resolve(method, target, body)
    payload = error.value.answer.payload
    assert isinstance(payload, dict)
    assert payload["code"] == "UNDEFINED"
    return error.value.answer.status, str(payload["message"])


@pytest.mark.parametrize(
    ("method", "target", "body", "message"),
    [
        ("GET", "/api/v1/daemon", b"", {"op": "daemon", "api": 1}),
        ("GET", "/api/v2/daemon", b"", {"op": "daemon", "api": 2}),
        ("GET", "http://unix/api/v1/daemon", b"", {"op": "daemon", "api": 1}),
        ("GET", "/api/v1/daemon?x=1#y", b"", {"op": "daemon", "api": 1}),
        ("PUT", "/api/v1/daemon", b'{"log_level":"Debug"}', {"op": "set_log_level", "log_level": "debug"}),
        ("PUT", "/api/v2/daemon", b'{"log_level":"off","x":1}', {"op": "set_log_level", "log_level": "off"}),
        ("GET", "/api/v1/daemon/events", b"", {"op": "events"}),
        ("GET", "/api/v1/daemon/backend?mountpoint=/", b"", {"op": "backend", "mountpoint": "/"}),
        ("GET", "/api/v1/daemon/backend?mountpoint=%2Fa%20b", b"", {"op": "backend", "mountpoint": "/a b"}),
        ("GET", "/api/v1/daemon/backend?mountpoint=", b"", {"op": "backend", "mountpoint": ""}),
        ("PUT", "/api/v1/daemon/start", b"", {"op": "start"}),
        (
            *("POST", "/api/v1/mount?mountpoint=/a"),
            b'{"source":"/b","fs_type":"rafs","config":"{}","prefetch_files":["/x"],"more":1}',
            {
                "op": "mount",
                "mountpoint": "/a",
                "source": "/b",
                "fs_type": "rafs",
                "config": "{}",
                "prefetch_files": ["/x"],
            },
        ),
        (
            *("PUT", "/api/v1/mount?mountpoint=%2Fa%2Fb"),
            b'{"source":"/b","config":""}',
            {
                "op": "remount",
                "mountpoint": "/a/b",
                "source": "/b",
                "fs_type": "",
                "config": "",
                "prefetch_files": None,
            },
        ),
        ("DELETE", "/api/v1/mount?mountpoint=/a", b"", {"op": "umount", "mountpoint": "/a"}),
        ("PUT", "/api/v1/daemon/exit", b"", {"op": "exit"}),
        ("GET", "/api/v1/metrics", b"", {"op": "metrics", "id": None}),
        ("GET", "/api/v1/metrics?id=/2", b"", {"op": "metrics", "id": "/2"}),
        ("GET", "/api/v1/metrics/backend", b"", {"op": "metrics_backend", "id": None}),
        ("GET", "/api/v1/metrics/blobcache?id=", b"", {"op": "metrics_blobcache", "id": ""}),
        ("GET", "/api/v1/nydusd/cache", b"", {"op": "cache"}),
        ("GET", "/api/v1/nydusd/chunks?blob_id=ab", b"", {"op": "chunks", "blob_id": "ab"}),
        ("GET", "/api/v1/nydusd/load", b"", {"op": "load"}),
        ("GET", "/api/v1/nydusd/trace?mountpoint=/a", b"", {"op": "trace", "mountpoint": "/a"}),
        ("GET", "/api/v1/nydusd/workers", b"", {"op": "workers"}),
        (
            *("PUT", "/api/v1/nydusd/workers", b'{"decompress": 4}'),
            {"op": "scale_workers", "wanted": {"decompress": 4}},
        ),
        ("PUT", "/api/v1/nydusd/workers/upgrade", b"", {"op": "upgrade_workers"}),
        ("GET", "/api/v1/nydusd/quota", b"", {"op": "quota"}),
        ("PUT", "/api/v1/nydusd/quota", b"{}", {"op": "gc", "target": None}),
        ("PUT", "/api/v1/nydusd/quota", b'{"target": 0, "x": 1}', {"op": "gc", "target": 0}),
    ],
)
def test_request_becomes_an_operation(method: str, target: str, body: bytes, message: dict[str, object]) -> None:
    assert ask(method, target, body) == message


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "message"),
    [
        ("GET", "/", b"", 404, "NoRoute"),
        ("GET", "/api/v1/daemon/", b"", 404, "NoRoute"),
        ("GET", "/API/v1/daemon", b"", 404, "NoRoute"),
        ("GET", "//api/v1/daemon", b"", 404, "NoRoute"),
        ("GET", "/api/v1/metrics/nothing", b"", 404, "NoRoute"),
        ("POST", "/api/v1/daemon", b"", 400, "BadRequest"),
        ("PATCH", "/api/v1/daemon", b"", 400, "BadRequest"),
        ("BREW", "/api/v1/daemon", b"", 400, "BadRequest"),
        ("GET", "/api/v1/daemon", b"x", 400, "BadRequest"),
        ("PUT", "/api/v1/daemon/exit", b"{}", 400, "BadRequest"),
        ("GET", "http://[/", b"", 400, "BadRequest"),
        ("GET", "/api/v1/metrics?" + "&".join(["id=1"] * 65), b"", 400, "BadRequest"),
        (
            *("GET", "/api/v1/daemon/backend", b"", 400),
            "QueryString(\"'mountpoint' should be specified in query string\")",
        ),
        ("PUT", "/api/v1/daemon", b'{"log_level":"loud"}', 500, "Configure(ResponsePayloadType)"),
        ("PUT", "/api/v1/daemon", b"{", 400, 'ParseBody(Error("the body is not JSON"))'),
        ("PUT", "/api/v1/daemon", b"[" * 100_000, 400, 'ParseBody(Error("the body is not JSON"))'),
        ("PUT", "/api/v1/daemon", b"\xff", 400, 'ParseBody(Error("the body is not JSON"))'),
        *(
            (
                "PUT",
                "/api/v1/daemon",
                body,
                400,
                'ParseBody(Error("the body must be an object with the text `log_level`"))',
            )
            for body in (b"{}", b"[]", b'{"log_level":null}', b'{"log_level":["info"]}')
        ),
        ("PUT", "/api/v1/daemon/fuse/sendfd", b"{}", 400, "BadRequest"),
        ("PUT", "/api/v1/daemon/fuse/takeover", b"{}", 400, "BadRequest"),
        ("PUT", "/api/v1/daemon", b"", 400, "BadRequest"),
        *(
            ("PUT", "/api/v1/config", body, 400, 'ParseBody(Error("the body must be an object of texts"))')
            for body in (b"[]", b'{"registry_auth":1}', b"null")
        ),
        ("DELETE", "/api/v1/mount", b"", 400, "QueryString(\"'mountpoint' should be specified in query string\")"),
        ("DELETE", "/api/v1/mount?mountpoint=/a", b"{}", 400, "BadRequest"),
        ("POST", "/api/v1/mount?mountpoint=/a", b"", 400, "BadRequest"),
        ("POST", "/api/v1/mount?mountpoint=/a", b"x", 400, 'ParseBody(Error("the body is not JSON"))'),
        ("POST", "/api/v1/mount?mountpoint=/a", b"[]", 400, 'ParseBody(Error("the body must be an object"))'),
        *(
            (
                "POST",
                "/api/v1/mount?mountpoint=/a",
                body,
                400,
                f'ParseBody(Error("the body must have the text `{key}`"))',
            )
            for body, key in (
                (b"{}", "source"),
                (b'{"source":1}', "source"),
                (b'{"source":"/b","fs_type":null}', "fs_type"),
                (b'{"source":"/b","fs_type":"rafs"}', "config"),
                (b'{"source":"/b","fs_type":"rafs","config":{}}', "config"),
            )
        ),
        *(
            (
                *("PUT", "/api/v1/mount?mountpoint=/a"),
                b'{"source":"/b","config":"","prefetch_files":%s}' % files,
                *(400, 'ParseBody(Error("`prefetch_files` must be a list of texts"))'),
            )
            for files in (b'"/a"', b"{}", b"[1]")
        ),
        *(
            ("PUT", path, body, 400, f'ParseBody(Error("{why}"))')
            for path, body, why in (
                ("/api/v1/nydusd/quota", b"{", "the body is not JSON"),
                ("/api/v1/nydusd/quota", b"\xff", "the body is not JSON"),
                ("/api/v1/nydusd/quota", b"[" * 100_000, "the body is not JSON"),
                *(("/api/v1/nydusd/quota", body, "the body must be an object") for body in (b"[]", b"null", b"5")),
                *(
                    ("/api/v1/nydusd/quota", b'{"target":%s}' % value, "target must be a number of bytes")
                    for value in (b"-1", b"1.5", b'"1"', b"true", b"[]", b"{}")
                ),
                ("/api/v1/nydusd/workers", b"{", "the body is not JSON"),
                ("/api/v1/nydusd/workers", b"[]", "the body must be an object: numbers of workers by role"),
            )
        ),
        ("PUT", "/api/v1/nydusd/quota", b"", 400, "BadRequest"),
        ("PUT", "/api/v1/nydusd/workers", b"", 400, "BadRequest"),
        ("PUT", "/api/v1/nydusd/workers/upgrade", b"{}", 400, "BadRequest"),
        ("GET", "/api/v2/blobs?blob_id=x", b"", 400, "BadRequest"),
        ("DELETE", "/api/v2/blobs", b"", 400, "BadRequest"),
        ("PUT", "/api/v2/blobs", b"[]", 400, 'ParseBody(Error("the body must be an object"))'),
        ("PUT", "/api/v2/blobs", b"{}", 400, 'ParseBody(Error("the body must have the text `type`"))'),
        ("PUT", "/api/v2/blobs", b'{"type":"bootstrap","id":"x"}', 400, "BadRequest"),
        (
            *("PUT", "/api/v2/blobs", b'{"type":"bootstrap","id":"x","config":[]}', 400),
            'ParseBody(Error("`config` must be an object"))',
        ),
    ],
)
def test_request_is_refused(method: str, target: str, body: bytes, status: int, message: str) -> None:
    assert refused(method, target, body) == (status, message)


@given(st.sampled_from(("GET", "PUT", "POST", "DELETE", "X")), st.text(max_size=60), st.binary(max_size=60))
def test_any_request_is_resolved_or_refused(method: str, target: str, body: bytes) -> None:
    for full in (target, f"/api/v1/daemon{target}", f"/api/v1/daemon/backend?mountpoint={target}"):
        try:
            assert isinstance(resolve(method, full, body), Call)
        except Refused as error:
            assert 400 <= error.answer.status <= 501


def test_daemon_info_has_the_version_even_if_the_supervisor_leaves_it_out() -> None:
    route = ROUTES["/api/v1/daemon"]["GET"]
    assert answer(route, {"ok": {"state": "RUNNING"}}) == Answer(200, {"version": build_info(), "state": "RUNNING"})
    assert answer(route, {"ok": {"version": "x"}}) == Answer(200, {"version": "x"})


def test_v2_daemon_info_has_no_file_systems() -> None:
    reply: dict[str, object] = {"ok": {"state": "RUNNING", "backend_collection": {"/": {}}}}
    payload = answer(ROUTES["/api/v2/daemon"]["GET"], reply).payload
    assert payload == {"version": build_info(), "state": "RUNNING", "backend_collection": None}


def test_success_without_a_body() -> None:
    assert answer(ROUTES["/api/v1/daemon/exit"]["PUT"], {"ok": None}) == Answer(204)


DAEMON, BACKEND, METRICS = "/api/v1/daemon/start", "/api/v1/daemon/backend", "/api/v1/metrics/blobcache"


@pytest.mark.parametrize(
    ("path", "method", "status", "given", "shown"),
    [
        (DAEMON, "PUT", 400, 'UnexpectedEvent("Start")', 'Configure(DaemonAbnormal(UnexpectedEvent("Start")))'),
        (DAEMON, "PUT", 503, "NotReady", "Configure(DaemonAbnormal(NotReady))"),
        (DAEMON, "PUT", 500, "ResponsePayloadType", "Configure(ResponsePayloadType)"),
        (DAEMON, "PUT", 500, 'say "no"', 'Configure(DaemonAbnormal(Other("say \\"no\\"")))'),
        (DAEMON, "PUT", 500, "Configure(X)", "Configure(X)"),
        (BACKEND, "GET", 500, "not there", 'FsBackendInfo(Metrics(Daemon(Other("not there"))))'),
        (BACKEND, "GET", 404, "not there", 'FsBackendInfo(Metrics(Daemon(Other("not there"))))'),
        (METRICS, "GET", 404, "no such id", "BlobcacheMetrics(Metrics(Stats(NoCounter)))"),
        (METRICS, "GET", 404, "Metrics(Stats(NoCounter))", "BlobcacheMetrics(Metrics(Stats(NoCounter)))"),
    ],
)
def test_errors_keep_the_shape_that_clients_know(path: str, method: str, status: int, given: str, shown: str) -> None:
    reply: dict[str, object] = {"error": {"status": status, "message": given}}
    assert answer(ROUTES[path][method], reply) == Answer(status, {"code": "UNDEFINED", "message": shown})


@pytest.mark.parametrize(
    "reply", [{}, {"error": {}}, {"error": {"status": 200}}, {"error": {"status": "x"}}, {"error": 5}]
)
def test_senseless_reply_is_an_error(reply: dict[str, object]) -> None:
    assert answer(ROUTES[DAEMON]["PUT"], reply).status == 500
