"""The one tree of errors.

Every error that this project raises on purpose derives from `NydusError`. Each class carries, as class attributes, what
the borders need: the `errno` a reader of the mount sees, the `exit_code` of a command, the `rest_status` of the API,
whether trying again can help (`temporary`), and whether a traceback helps whoever reads the log (`traceback`).
Errors are translated once, at the border (a front end, the API, `main`); nothing in between catches and rewords them.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class NydusError(Exception):
    """Root of all errors raised on purpose. The message says what happened, to what, and what to try."""

    errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1
    rest_status: ClassVar[int] = 500
    temporary: ClassVar[bool] = False
    traceback: ClassVar[bool] = False


class InternalError(NydusError):
    """Our bug: an invariant is gone. Never retried, always logged with its traceback."""

    traceback: ClassVar[bool] = True


class ConfigError(NydusError):
    """A flag or a configuration key is wrong. The message names the key, what is wrong and what is allowed."""

    exit_code: ClassVar[int] = 2
    rest_status: ClassVar[int] = 400


class FormatError(NydusError):
    """Bytes of an image, blob metadata, chunk map or state file are not what the format allows.

    `where` names the file (or the blob), `field` the field; the message holds the value and the rule it breaks.
    """

    def __init__(self, where: str, field: str, message: str) -> None:
        super().__init__(where, field, message)
        self.where = where
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.where}: {self.field}: {self.message}"


class UnsupportedError(NydusError):
    """The request or image asks for something this version does not do. The message says what to use instead."""

    rest_status: ClassVar[int] = 501


class CorruptChunkError(NydusError):
    """Fetched bytes do not decode to what the image's metadata promises: wrong digest, length or stream."""

    def __init__(self, blob_id: str, chunk: int, message: str) -> None:
        super().__init__(blob_id, chunk, message)
        self.blob_id = blob_id
        self.chunk = chunk
        self.message = message

    def __str__(self) -> str:
        return f"blob {self.blob_id} chunk {self.chunk}: {self.message}"


class BackendError(NydusError):
    """A backend could not give the bytes asked for."""


class NoSuchBlobError(BackendError):
    """The backend does not have this blob."""


class RangeNotSatisfiableError(BackendError):
    """The stored blob ends before the bytes asked for: it is truncated, or it is not the image's blob."""


class NoRangeSupportError(BackendError):
    """The server answers a request for some bytes with others, so it cannot serve an image lazily."""


class CredentialsRejectedError(BackendError):
    """The backend does not let us read: no credentials, wrong ones or expired ones, renewed in vain."""


class BackendTimeoutError(BackendError):
    """The reader's time is over before the bytes came."""

    errno: ClassVar[int] = _errno.ETIMEDOUT
    temporary: ClassVar[bool] = True


class BackendUnavailableError(BackendError):
    """The server cannot be reached, or fails. It is not worth a request before `retry_after` seconds are over."""

    temporary: ClassVar[bool] = True

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ThrottledError(BackendUnavailableError):
    """The server wants fewer requests (429, or 503 with Retry-After)."""


class CacheError(NydusError):
    """The cache folder or a file in it cannot be used. `errno` of the cause is in `cause_errno`."""

    def __init__(self, message: str, cause_errno: int | None = 0) -> None:
        super().__init__(message)
        self.cause_errno = cause_errno or 0


class StaleCacheError(CacheError):
    """The cache file was replaced, deleted or truncated by somebody else since the blob was opened."""

    temporary: ClassVar[bool] = True


class UnreadableError(CacheError):
    """The disk does not give what is in the cache file. The same bytes can be had from the backend."""

    temporary: ClassVar[bool] = True


class ScarceError(CacheError):
    """No file descriptor or no memory is left to open something with. Nothing is wrong with it: it can be opened later."""

    temporary: ClassVar[bool] = True


class LostWritesError(ScarceError):
    """Some of what was written to a cache file is lost, and it is not known yet what: that is found out soon."""


class SyncingError(ScarceError):
    """A cache file was opened while it was being synced: whether all of it is there is known when that is over."""


class EvictedError(CacheError):
    """Chunks were taken out of the cache file, to make room, while they were read. Asking again fetches them anew."""

    temporary: ClassVar[bool] = True


_SCARCE = (_errno.EMFILE, _errno.ENFILE, _errno.ENOMEM)
_CAUSES_MOST = 8


def is_scarce(error: BaseException) -> bool:
    """Whether something could not be done because file descriptors or memory are used up, whatever it was.

    The library for POSIX shared memory says so without a number, as it does of nothing else.
    """
    return isinstance(error, OSError) and (error.errno in _SCARCE or (type(error) is OSError and error.errno is None))


def comes_of_want(error: BaseException | None) -> bool:
    """Whether an error, or one of those that it was raised from, is that file descriptors or memory are used up."""
    seen = 0
    while error is not None and seen < _CAUSES_MOST:
        if isinstance(error, (ScarceError, MemoryError)) or (isinstance(error, OSError) and error.errno in _SCARCE):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def cache_error(what: str, error: Exception) -> CacheError:
    """The error for a file or a piece of shared memory that cannot be opened: ScarceError when that is not its fault."""
    number = error.errno if isinstance(error, OSError) else 0
    return (ScarceError if is_scarce(error) else CacheError)(f"{what}: {error}", number)


def shared_memory_error(what: str, error: Exception) -> CacheError:
    """The same for what is to be made in shared memory: there is room for it when others have given back theirs."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == _errno.ENOSPC):
        return ScarceError(f"{what}: {error}", _errno.ENOMEM)
    return cache_error(what, error)


class MountError(NydusError):
    """mount(2), umount(2) or the FUSE hand-shake failed."""


class UnmountedError(NydusError):
    """A request for an image that is not mounted any more, by who still has a file of it open."""

    errno: ClassVar[int] = _errno.ESTALE
