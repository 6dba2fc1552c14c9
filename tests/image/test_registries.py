"""Registries as `nydus-image convert` meets them: how images are named there, who may do what, and what is said of failures."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from nydusd.image.errors import ImageError
from nydusd.image.oci.convert import find_manifest
from nydusd.image.oci.history import new_history
from nydusd.image.oci.layout import Layout
from nydusd.image.oci.model import OCI_MANIFEST, descriptors, packed
from nydusd.image.oci.names import image_name
from tests.image.build import image, refused
from tests.image.test_convert import layers, source_layout
from tests.image.test_create_tar import file, tar_of
from tests.support.certificates import Authority
from tests.support.discipline import wait_until
from tests.support.faulty_server import Faulty, Reply, Request, faulty
from tests.support.registry import AUTH, TokenServer, docker_registry

PLATFORM = ("--platform", "linux/amd64")
HUB = "registry-1.docker.io"
EMPTY = {"created_by": "ENV A=1", "empty_layer": True}
OURS = {"created_by": "nydus-image convert"}
DIGEST = f"sha256:{'a' * 64}"


@pytest.mark.parametrize(
    ("reference", "server", "repo", "tag"),
    [
        ("python", HUB, "library/python", "latest"),
        ("python:3.12", HUB, "library/python", "3.12"),
        ("user/app:1", HUB, "user/app", "1"),
        ("docker.io/python:3.12", HUB, "library/python", "3.12"),
        ("docker.io/library/python:3.12", HUB, "library/python", "3.12"),
        ("index.docker.io/user/app", HUB, "user/app", "latest"),
        ("registry-1.docker.io/library/python:3.12", HUB, "library/python", "3.12"),
        (f"python:3.12@{DIGEST}", HUB, "library/python", DIGEST),
        ("localhost/app", "localhost", "app", "latest"),
        ("localhost:5000/a/b:c", "localhost:5000", "a/b", "c"),
        ("host:5000/app", "host:5000", "app", "latest"),
        ("[::1]:5000/app:1", "[::1]:5000", "app", "1"),
        (f"registry.example/a__b/c-d.e@{DIGEST}", "registry.example", "a__b/c-d.e", DIGEST),
    ],
)
def test_names_of_images_are_read_as_docker_reads_them(reference: str, server: str, repo: str, tag: str) -> None:
    name = image_name(reference)
    assert (name.server, name.repo, name.tag) == (server, repo, tag)


@pytest.mark.parametrize(
    "reference",
    ["", "Upper", "a/../b", "host.example/", "host.example//a", "a:", "a:-b", "a@sha256:1", "a b", "a/b?c", "a:\n"],
)
def test_what_is_no_name_of_an_image_is_refused(reference: str) -> None:
    with pytest.raises(ImageError, match="HOST/REPOSITORY:TAG is expected"):
        image_name(reference)


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    with contextlib.closing(TokenServer(Authority(tmp_path / "keys"))) as server:
        yield server


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that `docker login` writes."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path / "config.json"


def test_login_by_a_browser_is_used_as_docker_uses_it(tmp_path: Path, docker: Path, tokens: TokenServer) -> None:
    """What the login has left is an identity token, which the token server alone takes."""
    source = source_layout(tmp_path, layers()[:1])
    tokens.identities = {"secret-identity"}
    with docker_registry(tmp_path / "registry", auth="token", authority=tokens.authority, tokens=tokens) as registry:
        target = f"{registry.host}/some/repo:nydus"
        for identity in ("wrong-identity", "secret-identity"):
            docker.write_text(json.dumps({"auths": {registry.host: {"identitytoken": identity}}}))
            if identity in tokens.identities:
                image("convert", source, target, "--plain-http", *PLATFORM)
            else:
                text = refused("convert", source, target, "--plain-http", *PLATFORM)
                assert "status 401" in text and "are not taken; log in" in text and identity not in text
    assert {request.method for request in tokens.server.requests} == {"POST"}


def test_who_may_only_read_the_source_can_convert_it(tmp_path: Path, docker: Path, tokens: TokenServer) -> None:
    oci = source_layout(tmp_path, layers()[:1])
    with docker_registry(tmp_path / "registry", auth="token", authority=tokens.authority, tokens=tokens) as registry:
        docker.write_text(json.dumps({"auths": {registry.host: {"auth": AUTH}}}))
        source, target = f"{registry.host}/read/only:1", f"{registry.host}/my/own:1"
        image("convert", oci, source, "--plain-http", *PLATFORM)
        tokens.readers = {"read/only"}
        text = refused("convert", source, target, "--plain-http", *PLATFORM)
        assert "layer sha256:" in text  # it was read: that a nydus blob is no tar is the only fault
        text = refused("convert", oci, source, "--plain-http", *PLATFORM)
        assert "it gives no token (status 403) for repository:read/only:pull,push" in text


def test_unreachable_registries_are_told_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    authority = Authority(tmp_path / "keys")

    def said(host: str, *options: str) -> str:
        text = refused("convert", f"{host}/app:1", tmp_path / "out", *options)
        assert text.startswith(f"{host}/app:1: {host}: ")
        return text

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        assert "connection refused: does a registry listen there" in said(f"127.0.0.1:{bound.getsockname()[1]}")
    assert "this host name is not known here" in said("registry.invalid")
    with faulty(authority.server_context()) as server:
        assert "its certificate is not trusted (unable to get local issuer certificate)" in said(server.host)
        assert "manifest: status 404: there is nothing of that name" in refused(
            "convert", f"{server.host}/app:1", tmp_path / "out", "--insecure"
        )
    with faulty() as server:
        assert "it does not speak TLS as we do: --plain-http" in said(server.host)
        server.default = lambda request: Reply(200, {}, b"{", length=100, cut=1)
        assert "the connection ended in the middle" in said(server.host, "--plain-http")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(401), "app:1: it wants credentials; log in with docker (or podman) first"),
        (Reply(403, {}, b'{"errors": [{"code": "DENIED", "message": "free text"}]}'), "status 403 (DENIED): whoever docker"),
        (Reply(404, {}, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'), "status 404 (MANIFEST_UNKNOWN): there is nothing"),
        (Reply(429, {}, b'{"errors": 5}'), "status 429: too many requests: wait, or log in"),
        (Reply(503, {}, b"<html>"), "status 503: the registry itself has failed: try again later"),
        (Reply(400), "status 400: it may want TLS: try without --plain-http"),
        (Reply(401, {"WWW-Authenticate": 'Bearer realm="ftp://x/"'}), "it names a token server by no usable URL"),
        (Reply(401, {"WWW-Authenticate": 'Bearer realm="http://127.0.0.1:1/"'}), "it gives no token: connection refused"),
    ],
)  # fmt: skip
def test_refusals_are_told_with_what_to_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, expected: str
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with faulty() as server:
        server.default = lambda request: reply
        text = refused("convert", f"{server.host}/app:1", tmp_path / "out", "--plain-http")
    assert expected in text and "free text" not in text


def small_layers(count: int) -> list[bytes]:
    return [gzip.compress(tar_of(file(f"file-{number}", b"data")), mtime=0) for number in range(count)]


@contextlib.contextmanager
def serving(oci: Path) -> Iterator[tuple[Faulty, list[str]]]:
    """A registry in this process that gives the image of a layout as `app`; and the digests of its layers."""
    layout = Layout(oci, "latest")
    manifest = packed(find_manifest(layout, "linux/amd64"))

    def blob(request: Request) -> Reply:
        return Reply(200, {}, (oci / "blobs/sha256" / request.path.rpartition(":")[2]).read_bytes())

    with faulty() as server:
        server.default = blob
        server.program("/v2/app/manifests/1", Reply(200, {"Content-Type": OCI_MANIFEST}, manifest))
        yield server, [str(layer["digest"]) for layer in json.loads(manifest)["layers"]]


def test_layers_are_fetched_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meet = threading.Barrier(4)
    with serving(source_layout(tmp_path, small_layers(5))) as (server, digests):
        blob = server.default

        def together(request: Request) -> Reply:
            meet.wait(60)  # raises, and breaks the connection, if the four are not here at once
            return blob(request)

        for digest in digests[:4]:
            server.handlers[f"/v2/app/blobs/{digest}"] = together
        image("convert", f"{server.host}/app:1", tmp_path / "out", "--plain-http")
        assert all(server.count(f"/v2/app/blobs/{digest}") == 1 for digest in digests)
    told = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == [f"{number} of 5 layers converted" for number in range(1, 6)]


def test_layer_is_converted_while_another_is_fetched(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with serving(source_layout(tmp_path, small_layers(2))) as (server, digests):
        blob = server.default

        def when_the_other_is_there(request: Request) -> Reply:
            wait_until(lambda: any(cache.glob(f"{digests[1][7:]}.*")), "the other layer", 60)
            return blob(request)

        server.handlers[f"/v2/app/blobs/{digests[0]}"] = when_the_other_is_there
        image("convert", f"{server.host}/app:1", tmp_path / "out", "--plain-http", "--cache", cache)


def test_layer_that_cannot_be_fetched_ends_the_conversion_and_its_workers(tmp_path: Path) -> None:
    with serving(source_layout(tmp_path, small_layers(3))) as (server, digests):
        server.handlers[f"/v2/app/blobs/{digests[0]}"] = lambda request: Reply(200, {}, b"", length=10, silent=True)
        server.handlers[f"/v2/app/blobs/{digests[2]}"] = lambda request: Reply(500)
        text = refused(
            "convert", f"{server.host}/app:1", tmp_path / "out", "--plain-http", "--cache", tmp_path / "kept"
        )
    assert f"blob {digests[2]}: status 500" in text and not (tmp_path / "out").exists()
    # The one that can be fetched may have been complete before, or not begun.
    assert all(path.name.startswith(digests[1][7:]) for path in (tmp_path / "kept").glob("*"))


def test_a_storage_server_is_told_no_credentials_and_names_no_token_server(tmp_path: Path, docker: Path) -> None:
    with serving(source_layout(tmp_path, small_layers(1))) as (registry, digests), faulty() as storage:
        docker.write_text(json.dumps({"auths": {registry.host: {"auth": AUTH}}}))
        registry.handlers[f"/v2/app/blobs/{digests[0]}"] = lambda request: Reply(307, {"Location": f"{storage.url}/it"})
        challenge = f'Bearer realm="{storage.url}/token",service="storage"'
        storage.default = lambda request: Reply(401, {"WWW-Authenticate": challenge})
        text = refused("convert", f"{registry.host}/app:1", tmp_path / "out", "--plain-http")
    assert "status 401" in text
    assert {request.path for request in storage.requests} == {"/it"}
    assert all("authorization" not in request.headers for request in storage.requests)


BOMB = gzip.compress(bytes(256 << 20))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(200, {"Content-Encoding": "gzip"}, BOMB), "a manifest of more than 4194304 bytes"),
        (Reply(404, {"Content-Encoding": "gzip"}, BOMB), "status 404: there is nothing of that name"),
        (Reply(401, {"Content-Encoding": "gzip"}, BOMB), "it wants credentials"),
        (Reply(307, {"Location": "http://["}), "it sends us to no usable URL"),
        (Reply(307, {"Location": "file:///etc/passwd"}), "it sends us to no usable URL"),
        (Reply(307, {"Location": "/v2/app/manifests/1"}), "status 307"),
        (Reply(429, {"Retry-After": "86400"}), "status 429: too many requests"),
    ],
)
def test_hostile_registry_ends_the_command_with_the_reason(
    tmp_path: Path, docker: Path, reply: Reply, expected: str
) -> None:
    """Not with a traceback, a wait or all memory."""
    with faulty() as server:
        server.default = lambda request: reply
        tracemalloc.start()
        text = refused("convert", f"{server.host}/app:1", tmp_path / "out", "--plain-http")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert expected in text and peak < 64 << 20


def test_storage_server_that_says_when_to_come_again_is_not_waited_for(tmp_path: Path, docker: Path) -> None:
    with serving(source_layout(tmp_path, small_layers(1))) as (registry, digests), faulty() as storage:
        registry.handlers[f"/v2/app/blobs/{digests[0]}"] = lambda request: Reply(307, {"Location": f"{storage.url}/it"})
        storage.default = lambda request: Reply(503, {"Retry-After": "3600"})
        text = refused("convert", f"{registry.host}/app:1", tmp_path / "out", "--plain-http")
    assert f"blob {digests[0]}: status 503" in text and len(storage.requests) == 1


def test_blob_that_is_longer_than_its_manifest_says_is_not_read_on(tmp_path: Path, docker: Path) -> None:
    with serving(source_layout(tmp_path, small_layers(1))) as (server, digests):
        server.handlers[f"/v2/app/blobs/{digests[0]}"] = lambda request: Reply(200, {}, bytes(64 << 20))
        text = refused("convert", f"{server.host}/app:1", tmp_path / "out", "--plain-http")
    assert f"blob {digests[0]} is longer than its manifest says" in text


@pytest.mark.parametrize("size", [-1, True, 1 << 63, int("9" * 4000)])
def test_sizes_that_cannot_be_are_refused(size: int) -> None:
    with pytest.raises(ImageError, match=r"layers: a size of .* bytes"):
        descriptors([{"digest": DIGEST, "size": size}], "layers")


def test_config_that_is_too_long_is_not_fetched(tmp_path: Path) -> None:
    source_layout(tmp_path, small_layers(1))
    layout = Layout(tmp_path / "oci", "latest")
    manifest = find_manifest(layout, "linux/amd64")
    config = manifest["config"]
    assert isinstance(config, dict)
    layout.tag(packed({**manifest, "config": {**config, "size": 5 << 20}}), OCI_MANIFEST)
    assert "config: 5242880 bytes" in refused("convert", f"{tmp_path / 'oci'}:latest", tmp_path / "out")


def test_pipes_and_endless_files_in_a_layout_are_refused(tmp_path: Path) -> None:
    folder = Path(source_layout(tmp_path, small_layers(1))).parent / "oci"
    index = folder / "index.json"
    with open(index, "r+b") as file:
        file.truncate(1 << 40)
    assert f"{index}: more than 4194304 bytes" in refused("convert", f"{folder}:latest", tmp_path / "out")
    index.unlink()
    os.mkfifo(index)
    assert f"{index}: cannot be read: no regular file" in refused("convert", f"{folder}:latest", tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "kept", "expected"),
    [
        ([{"a": 1}, EMPTY, {"c": 1}], [True, True], [{"a": 1}, EMPTY, {"c": 1}]),
        ([{"a": 1}, {"b": 1}], [False, True], [{"a": 1, "empty_layer": True}, {"b": 1}]),
        ([], [], []),
        ([{"a": 1}], [True, False, True], [OURS, OURS]),
        (None, [True], [OURS]),
        (["no entry", {"a": 1}], [True], [OURS]),
    ],
)  # fmt: skip
def test_history_goes_with_the_layers(old: object, kept: list[bool], expected: list[object]) -> None:
    assert new_history(old, kept) == [*expected, OURS]
