"""What the supervisor is told of a job that failed. Used by the workers at their border; nothing here outlives a job."""

from __future__ import annotations

from nydusd.errors import BackendTimeoutError, BackendUnavailableError, NydusError
from nydusd.ipc.messages import Json


def failure(error: NydusError) -> Json:
    """The error as an answer. `retry_after` is there if the backend may do better after so many seconds."""
    told: Json = {"error": str(error), "errno": error.errno, "type": type(error).__name__}
    if isinstance(error, BackendUnavailableError):
        told["retry_after"] = error.retry_after
    elif isinstance(error, BackendTimeoutError):
        told["retry_after"] = 0.0
    return told
