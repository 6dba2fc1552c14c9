"""An image in a registry: pull and push over the OCI distribution API. Runs in the process of the command and its workers.

Only the registry that they are for gets credentials (`nydusd.image.oci.login`), never who it redirects to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3

from nydusd.image.errors import ImageError
from nydusd.image.oci.login import Login
from nydusd.image.oci.model import INDEXES, MANIFESTS, MAX_JSON, digest_of
from nydusd.image.oci.names import image_name
from nydusd.image.oci.reply import RETRIES, Reply, end, whole
from nydusd.image.oci.trouble import reason, refusal
from nydusd.image.output import save

_PIECE = 1 << 20
_ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
_TIMEOUT = urllib3.Timeout(connect=10, read=300)
_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_HOPS = 5

T = TypeVar("T")
R = TypeVar("R", Reply, urllib3.BaseHTTPResponse)


class Registry:
    """The image that a reference names (`nydusd.image.oci.names`). `plain_http` for registries without TLS; `push` if it is
    to be written there, too."""

    def __init__(self, reference: str, *, plain_http: bool, insecure: bool = False, push: bool = False) -> None:
        self._name = image_name(reference)
        self._plain_http = plain_http
        self._push = push
        self._base = f"{'http' if plain_http else 'https'}://{self._name.server}/v2/{self._name.repo}/"
        self._http = urllib3.PoolManager(
            timeout=_TIMEOUT,
            retries=RETRIES,
            cert_reqs="CERT_NONE" if insecure else None,
        )
        if insecure:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # who asked for it knows
        self._login = Login(self._http, self._name, push=push)

    def _request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | Callable[[], Iterator[bytes]] | None = None,
    ) -> Reply:
        """An answer that is small, whatever it turns out to be."""
        return self._within(url, lambda: whole(self._open(method, url, headers, body)))

    def _open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | Callable[[], Iterator[bytes]] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """An answer whose content is still to be read; the caller ends it."""
        target = self._joined(self._base, url)
        for attempt in (1, 2):
            own = urlsplit(target)[:2] == urlsplit(self._base)[:2]
            sent = {**(headers or {})}
            if self._login.header and own:
                sent["Authorization"] = self._login.header
            content = body() if callable(body) else body
            answer = self._send(method, target, sent, content)
            place = target
            for _ in range(_MAX_HOPS):
                if answer.status not in _REDIRECTS or method not in ("GET", "HEAD"):
                    break
                # A storage server must not see the registry's credentials, nor say where to send them.
                own = False
                end(answer)
                place = self._joined(place, answer.headers.get("Location", ""))
                answer = self._send(method, place)
            if answer.status != 401 or attempt == 2 or not own:
                return answer
            end(answer)
            self._login.take(answer.headers.get("WWW-Authenticate", ""))
        raise AssertionError("not reached")

    def _send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterator[bytes] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        return self._within(
            url,
            lambda: self._http.request(method, url, headers=headers, body=body, preload_content=False, redirect=False),
        )

    def _within(self, url: str, ask: Callable[[], T]) -> T:
        """What `ask` gives. Raises `ImageError` for what urllib3 raises."""
        try:
            return ask()
        except urllib3.exceptions.HTTPError as error:
            host = urlsplit(urljoin(self._base, url)).netloc
            raise ImageError(f"{self._name.text}: {host}: {reason(error)}") from error

    def _joined(self, base: str, url: str) -> str:
        """The URL that a server has named. Raises `ImageError` for one that leads nowhere."""
        try:
            joined = urljoin(base, url)
            usable = urlsplit(joined).scheme in ("http", "https") and bool(urlsplit(joined).hostname)
        except ValueError:
            usable = False
        if not usable or not joined.isprintable():
            raise ImageError(f"{self._name.text}: {urlsplit(base).netloc}: it sends us to no usable URL")
        return joined

    def _checked(self, answer: R, what: str, *good: int) -> R:
        if answer.status not in good:
            reply = answer if isinstance(answer, Reply) else self._within("", lambda: whole(answer))
            why = refusal(reply, self._name.host, push=self._push, plain_http=self._plain_http)
            raise ImageError(f"{self._name.text}: {what}: {why}")
        return answer

    def manifest(self) -> tuple[bytes, str]:
        answer = self._checked(
            self._request("GET", f"manifests/{self._name.tag}", {"Accept": _ACCEPT}), "manifest", 200
        )
        return self._small(answer), answer.headers.get("Content-Type", "").partition(";")[0]

    def manifest_of(self, descriptor: Mapping[str, object]) -> bytes:
        answer = self._request("GET", f"manifests/{descriptor['digest']}", {"Accept": _ACCEPT})
        data = self._small(self._checked(answer, "manifest", 200))
        if digest_of(data) != descriptor["digest"]:
            raise ImageError(f"{self._name.text}: manifest {descriptor['digest']} has another digest")
        return data

    def _small(self, answer: Reply) -> bytes:
        if len(answer.data) > MAX_JSON:
            raise ImageError(f"{self._name.text}: a manifest of more than {MAX_JSON} bytes")
        return answer.data

    def fetch(self, descriptor: Mapping[str, object], path: str) -> None:
        wanted, size = str(descriptor["digest"]), int(str(descriptor["size"]))
        answer = self._open("GET", f"blobs/{wanted}")
        try:
            self._checked(answer, f"blob {wanted}", 200)
            digest = save(Path(path), self._pieces(answer, wanted, size))
        finally:
            answer.close()
        if f"sha256:{digest}" != wanted:
            raise ImageError(f"{self._name.text}: blob {wanted} came with another digest")

    def _pieces(self, answer: urllib3.BaseHTTPResponse, digest: str, size: int) -> Iterator[bytes]:
        try:
            for piece in answer.stream(_PIECE, decode_content=False):
                size -= len(piece)
                if size < 0:
                    raise ImageError(f"{self._name.text}: blob {digest} is longer than its manifest says")
                yield piece
        except urllib3.exceptions.HTTPError as error:
            raise ImageError(f"{self._name.text}: blob {digest}: {reason(error)}") from error

    def has(self, digest: str) -> bool:
        return self._request("HEAD", f"blobs/{digest}").status == 200

    def put(self, path: str, digest: str, size: int) -> None:
        started = self._checked(self._request("POST", "blobs/uploads/"), "upload", 202)
        location = self._joined(self._base, started.headers.get("Location", ""))
        separator = "&" if "?" in location else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        target = f"{location}{separator}{urlencode({'digest': digest})}"
        self._checked(self._request("PUT", target, headers, lambda: _file_pieces(path)), f"upload of {digest}", 201)

    def tag(self, manifest: bytes, media_type: str) -> None:
        answer = self._request("PUT", f"manifests/{self._name.tag}", {"Content-Type": media_type}, manifest)
        self._checked(answer, "manifest", 201)

    def close(self) -> None:
        """End all connections; the next request opens others. (A pool that is dropped alone ends its own some time.)"""
        for key in self._http.pools.keys():  # noqa: SIM118  (it cannot be iterated itself)
            pool = self._http.pools.get(key)
            if pool is not None:
                pool.close()
        self._http.clear()


def _file_pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece
