"""What the supervisor is told of a job that failed. Used by the workers at their border; nothing here outlives a job."""

from __future__ import annotations

from nydusd.errors import BackendTimeoutError, BackendUnavailableError, NydusError, ScarceError, comes_of_want
from nydusd.ipc.messages import Json


def failure(error: NydusError) -> Json:
    """The error as an answer.

    `retry_after` is there if it may go better after so many seconds: the backend says so, or something was lacking here.
    """
    if comes_of_want(error):
        return for_want(str(error))
    told: Json = {"error": str(error), "errno": error.errno, "type": type(error).__name__}
    if isinstance(error, BackendUnavailableError):
        told["retry_after"] = error.retry_after
    elif isinstance(error, BackendTimeoutError):
        told["retry_after"] = 0.0
    return told


def for_want(why: str) -> Json:
    """The answer of a job for which file descriptors or memory were lacking: nothing is wrong with what it was to fill."""
    return {"error": why, "errno": ScarceError.errno, "type": ScarceError.__name__, "retry_after": 0.0}
