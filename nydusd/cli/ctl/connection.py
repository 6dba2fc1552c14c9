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
MOUNT_PATIENCE: Final = 65.0
"""Seconds for what is done to an image: the API answers within 60."""
_MAX_ANSWER: Final = 64 << 20


def _encoded(query: Mapping[str, str]) -> str:
    """An argument that is not valid Unicode is sent as the bytes that it is."""
    return urlencode(query, errors="surrogateescape")


class RequestFailed(NydusError):
    """The API could not be reached, or it answered with an error."""


class SilentError(RequestFailed):
    """The API did not answer in time."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, patience: float) -> None:
        super().__init__("unix", timeout=patience)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Api:
    """The API of the daemon that listens on a socket path."""

    def __init__(self, path: str, patience: float = _PATIENCE) -> None:
        self._path = path
        self._patience = patience

    @property
    def path(self) -> str:
        """Where the daemon listens."""
        return self._path

    def with_patience(self, seconds: float) -> Api:
        """The same, with another time-out for each answer."""
        return Api(self._path, seconds)

    def text(self, path: str) -> bytes:
        """What is at a path that does not give JSON. Raises `RequestFailed`."""
        return self._request("GET", path, None)

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Json:
        """The JSON object at a path. Raises `RequestFailed`."""
        return self._object(f"GET {path}", self._request("GET", f"{path}?{_encoded(query)}" if query else path, None))

    @staticmethod
    def _object(asked: str, answer: bytes) -> Json:
        try:
            data = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RequestFailed(f"{asked}: the answer is not JSON: {answer[:80]!r}") from error
        if not isinstance(data, dict):
            raise RequestFailed(f"{asked}: the answer is not an object: {answer[:80]!r}")
        return data

    def put(self, path: str, body: Json | None) -> Json:
        """Send a JSON object, or nothing, to a path; gives the object in the answer, if any. Raises `RequestFailed`."""
        answer = self._request("PUT", path, None if body is None else json.dumps(body).encode())
        return self._object(f"PUT {path}", answer) if answer else {}

    def post(self, path: str, query: Mapping[str, str], body: Json) -> None:
        """Send a JSON object to a path. Raises `RequestFailed`."""
        self._request("POST", f"{path}?{_encoded(query)}", json.dumps(body).encode())

    def delete(self, path: str, query: Mapping[str, str]) -> None:
        """Raises `RequestFailed`."""
        self._request("DELETE", f"{path}?{_encoded(query)}", None)

    def _request(self, method: str, target: str, body: bytes | None) -> bytes:
        connection = _UnixConnection(self._path, self._patience)
        try:
            connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            answer = response.read(_MAX_ANSWER)
        except TimeoutError as error:
            raise SilentError(f"{self._path}: no answer within {self._patience:g} s") from error
        except FileNotFoundError as error:
            raise RequestFailed(
                f"{self._path}: no such socket: was the daemon started with this --apisock? `nydusctl list` names those of "
                "all daemons"
            ) from error
        except ConnectionRefusedError as error:
            raise RequestFailed(
                f"{self._path}: nobody listens: the daemon has ended, or is being started again"
            ) from error
        except PermissionError as error:
            raise RequestFailed(f"{self._path}: permission denied: run nydusctl as the daemon's user (root)") from error
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
