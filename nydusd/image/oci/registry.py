"""An image in a registry: pull and push over the OCI distribution API. Runs in the process of the command and its workers.

Only the registry that they are for gets credentials (`nydusd.image.oci.login`), never who it redirects to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3

from nydusd.image.errors import ImageError
from nydusd.image.oci.login import Login
from nydusd.image.oci.model import INDEXES, MANIFESTS, MAX_JSON, digest_of
from nydusd.image.oci.names import image_name
from nydusd.image.oci.trouble import reason, refusal
from nydusd.image.output import save

_PIECE = 1 << 20
_ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
_TIMEOUT = urllib3.Timeout(connect=10, read=300)


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
            retries=urllib3.Retry(3, redirect=0, status=0),
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
        *,
        stream: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        target = urljoin(self._base, url)
        for attempt in (1, 2):
            sent = {**(headers or {})}
            own = urlsplit(target)[:2] == urlsplit(self._base)[:2]
            if self._login.header and own:
                sent["Authorization"] = self._login.header
            try:
                content = body() if callable(body) else body
                answer = self._http.request(
                    method, target, headers=sent, body=content, preload_content=not stream, redirect=False
                )
                if answer.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                    location = urljoin(target, answer.headers.get("Location", ""))
                    answer.drain_conn()
                    # A storage server must not see the registry's credentials, nor say where to send them.
                    own = False
                    answer = self._http.request(method, location, preload_content=not stream, retries=3)
            except urllib3.exceptions.HTTPError as error:
                raise ImageError(f"{self._name.text}: {urlsplit(target).netloc}: {reason(error)}") from error
            if answer.status != 401 or attempt == 2 or not own:
                return answer
            answer.drain_conn()
            self._login.take(answer.headers.get("WWW-Authenticate", ""))
        raise AssertionError("not reached")

    def _checked(self, answer: urllib3.BaseHTTPResponse, what: str, *good: int) -> urllib3.BaseHTTPResponse:
        if answer.status not in good:
            why = refusal(answer, self._name.host, push=self._push, plain_http=self._plain_http)
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

    def _small(self, answer: urllib3.BaseHTTPResponse) -> bytes:
        if len(answer.data) > MAX_JSON:
            raise ImageError(f"{self._name.text}: a manifest of {len(answer.data)} bytes")
        return answer.data

    def fetch(self, descriptor: Mapping[str, object], path: str) -> None:
        answer = self._request("GET", f"blobs/{descriptor['digest']}", stream=True)
        try:
            self._checked(answer, f"blob {descriptor['digest']}", 200)
            digest = save(Path(path), self._pieces(answer, str(descriptor["digest"])))
        finally:
            answer.release_conn()
        if f"sha256:{digest}" != descriptor["digest"]:
            raise ImageError(f"{self._name.text}: blob {descriptor['digest']} came with another digest")

    def _pieces(self, answer: urllib3.BaseHTTPResponse, digest: str) -> Iterator[bytes]:
        try:
            yield from answer.stream(_PIECE, decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise ImageError(f"{self._name.text}: blob {digest}: {reason(error)}") from error

    def has(self, digest: str) -> bool:
        return self._request("HEAD", f"blobs/{digest}").status == 200

    def put(self, path: str, digest: str, size: int) -> None:
        started = self._checked(self._request("POST", "blobs/uploads/"), "upload", 202)
        location = urljoin(self._base, started.headers.get("Location", ""))
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
