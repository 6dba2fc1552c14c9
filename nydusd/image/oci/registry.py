"""An image in a registry: pull and push over the OCI distribution API. Runs in the process of the command.

Credentials come from docker's configuration, as for the daemon. Only this module sends them, and only to the registry
that they are for or to the token server that it names over TLS.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3

from nydusd.image.errors import ImageError
from nydusd.image.oci.model import INDEXES, MANIFESTS, MAX_JSON, digest_of
from nydusd.image.output import save
from nydusd.storage.backend.registry.challenge import parse_challenges
from nydusd.storage.backend.registry.credentials import CredentialSource

_NAME = re.compile(r"(?P<host>[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9a-fA-F:]+\](:[0-9]+)?)/(?P<repo>[a-z0-9._/-]+)")
_PIECE = 1 << 20
_ACCEPT = ", ".join((*MANIFESTS, *INDEXES))
_TIMEOUT = urllib3.Timeout(connect=10, read=300)


class Registry:
    """The image that `HOST/REPOSITORY:TAG` (or `@DIGEST`) names. `plain_http` for registries without TLS."""

    def __init__(self, reference: str, *, plain_http: bool, insecure: bool = False) -> None:
        rest, _, digest = reference.partition("@")
        tail = rest.rsplit("/", 1)[-1]
        tag = tail.rpartition(":")[2] if ":" in tail else "latest"
        match = _NAME.fullmatch(rest.removesuffix(f":{tag}") if ":" in tail else rest)
        if not match:
            raise ImageError(f"{reference}: HOST/REPOSITORY:TAG is expected")
        self._host, self._repo, self._tag = match["host"], match["repo"], digest or tag
        self._base = f"{'http' if plain_http else 'https'}://{self._host}/v2/{self._repo}/"
        self._http = urllib3.PoolManager(
            timeout=_TIMEOUT,
            retries=urllib3.Retry(3, redirect=0, status=0),
            cert_reqs="CERT_NONE" if insecure else None,
        )
        if insecure:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # who asked for it knows
        self._source = CredentialSource(self._host, "")
        self._authorization = ""

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
            if self._authorization and urlsplit(target).netloc == self._host:
                sent["Authorization"] = self._authorization
            try:
                content = body() if callable(body) else body
                answer = self._http.request(
                    method, target, headers=sent, body=content, preload_content=not stream, redirect=False
                )
                if answer.status in (301, 302, 303, 307, 308) and method in ("GET", "HEAD"):
                    location = urljoin(target, answer.headers.get("Location", ""))
                    answer.drain_conn()
                    # A storage server must not see the registry's credentials.
                    answer = self._http.request(method, location, preload_content=not stream, retries=3)
            except urllib3.exceptions.HTTPError as error:
                raise ImageError(f"{self._host}: {method} failed: {type(error).__name__}") from error
            if answer.status != 401 or attempt == 2:
                return answer
            answer.drain_conn()
            self._authenticate(answer.headers.get("WWW-Authenticate", ""))
        raise AssertionError("not reached")

    def _authenticate(self, header: str) -> None:
        credentials = self._source.current()
        for challenge in parse_challenges(header):
            if challenge.scheme == "basic" and credentials.basic:
                self._authorization = f"Basic {credentials.basic}"
                return
            if challenge.scheme == "bearer" and "realm" in challenge.params:
                self._authorization = f"Bearer {self._token(challenge.params, credentials.basic)}"
                return
        raise ImageError(f"{self._host}: it wants credentials; log in with docker (or podman) first")

    def _token(self, params: Mapping[str, str], basic: str) -> str:
        realm = params["realm"]
        parts = urlsplit(realm)
        safe = parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
        query = {"service": params.get("service", ""), "scope": f"repository:{self._repo}:pull,push"}
        headers = {"Authorization": f"Basic {basic}"} if basic and safe else {}
        try:
            answer = self._http.request("GET", f"{realm}?{urlencode(query)}", headers=headers, retries=3)
            found = json.loads(answer.data) if answer.status == 200 else {}
        except (urllib3.exceptions.HTTPError, ValueError) as error:
            raise ImageError(f"{parts.netloc}: it gives no token: {type(error).__name__}") from error
        token = found.get("token") or found.get("access_token") if isinstance(found, dict) else None
        if not isinstance(token, str):
            raise ImageError(f"{parts.netloc}: it gives no token (status {answer.status})")
        return token

    def _checked(self, answer: urllib3.BaseHTTPResponse, what: str, *good: int) -> urllib3.BaseHTTPResponse:
        if answer.status not in good:
            raise ImageError(f"{self._host}/{self._repo}: {what}: status {answer.status}")
        return answer

    def manifest(self) -> tuple[bytes, str]:
        answer = self._checked(self._request("GET", f"manifests/{self._tag}", {"Accept": _ACCEPT}), "manifest", 200)
        return self._small(answer), answer.headers.get("Content-Type", "").partition(";")[0]

    def manifest_of(self, descriptor: Mapping[str, object]) -> bytes:
        answer = self._request("GET", f"manifests/{descriptor['digest']}", {"Accept": _ACCEPT})
        data = self._small(self._checked(answer, "manifest", 200))
        if digest_of(data) != descriptor["digest"]:
            raise ImageError(f"{self._host}/{self._repo}: manifest {descriptor['digest']} has another digest")
        return data

    def _small(self, answer: urllib3.BaseHTTPResponse) -> bytes:
        if len(answer.data) > MAX_JSON:
            raise ImageError(f"{self._host}/{self._repo}: a manifest of {len(answer.data)} bytes")
        return answer.data

    def fetch(self, descriptor: Mapping[str, object], path: str) -> None:
        answer = self._request("GET", f"blobs/{descriptor['digest']}", stream=True)
        try:
            self._checked(answer, f"blob {descriptor['digest']}", 200)
            digest = save(Path(path), self._pieces(answer, str(descriptor["digest"])))
        finally:
            answer.release_conn()
        if f"sha256:{digest}" != descriptor["digest"]:
            raise ImageError(f"{self._host}/{self._repo}: blob {descriptor['digest']} came with another digest")

    def _pieces(self, answer: urllib3.BaseHTTPResponse, digest: str) -> Iterator[bytes]:
        try:
            yield from answer.stream(_PIECE, decode_content=False)
        except (OSError, urllib3.exceptions.HTTPError) as error:
            raise ImageError(f"{self._host}/{self._repo}: blob {digest} cannot be fetched: {error}") from error

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
        answer = self._request("PUT", f"manifests/{self._tag}", {"Content-Type": media_type}, manifest)
        self._checked(answer, "manifest", 201)

    def close(self) -> None:
        self._http.clear()


def _file_pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece
