"""HTTP over the API's unix socket, for one request at a time. Runs in the `nydusctl` process."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlencode

from nydusd.errors import NydusError

Json = dict[str, object]

_PATIENCE: Final = 30.0
_MAX_ANSWER: Final = 64 << 20


class RequestFailed(NydusError):
    """The API could not be reached, or it answered with an error."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("unix", timeout=_PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Api:
    """The API of the daemon that listens on a socket path."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Json:
        """The JSON object at a path. Raises `RequestFailed`."""
        answer = self._request("GET", f"{path}?{urlencode(query)}" if query else path, None)
        try:
            data = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RequestFailed(f"GET {path}: the answer is not JSON: {answer[:80]!r}") from error
        if not isinstance(data, dict):
            raise RequestFailed(f"GET {path}: the answer is not an object: {answer[:80]!r}")
        return data

    def put(self, path: str, body: Json) -> None:
        """Send a JSON object to a path. Raises `RequestFailed`."""
        self._request("PUT", path, json.dumps(body).encode())

    def _request(self, method: str, target: str, body: bytes | None) -> bytes:
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            answer = response.read(_MAX_ANSWER)
        except TimeoutError as error:
            raise RequestFailed(f"{self._path}: no answer within {_PATIENCE:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = (
                error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
            )
            raise RequestFailed(f"{self._path}: cannot talk to the daemon: {reason}") from error
        finally:
            connection.close()
        if not 200 <= response.status < 300:
            raise RequestFailed(f"{method} {target}: status {response.status}: {_message(answer)}")
        return answer


def _message(answer: bytes) -> str:
    """The text of an error body, or the body."""
    try:
        data = json.loads(answer)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict) and isinstance(data.get("message"), str):
        return str(data["message"])
    return answer[:200].decode(errors="replace")
