"""Logging of every process of a daemon: one line format, one shared file (or stderr), no secrets.

The standard library's logging with our own handler. The file is opened with O_APPEND and each record is one write, so
processes need no lock to share it. It is rotated by whichever process finds it too long, under flock on the file itself;
the others notice the new file by its inode before their next record, as they notice one made by logrotate.
A process that is killed leaves nothing to repair. SIGUSR1 dumps the stacks of the process to the same stream.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Final

from nydusd.errors import ConfigError
from nydusd.redact import MASK, redact_text

TRACE: Final = 5
LEVELS: Final = {
    "trace": TRACE,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 10,
}
"""Levels by the names of the command line and the API (`off` in the API only)."""
_NAMES: Final = {TRACE: "TRACE", 10: "DEBUG", 20: "INFO", 30: "WARN", 40: "ERROR", 50: "ERROR"}
_PRIORITIES: Final = ((40, 3), (30, 4), (20, 6), (0, 7))
"""Levels and what syslog calls them."""
_KEPT_FILES: Final = 10
_MIN_SECRET: Final = 4
"""Shorter values are not masked: they occur in innocent text, and every log line would be unreadable."""

_ESCAPES: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127) if code != 9}
"""A file name from an image must not begin a line of its own or drive the reader's terminal."""

_secrets: list[str] = []


def setup(level: str, file: str | None, role: str, rotation_size: int = 0) -> None:
    """Send this process's log to `file` or, if None, to stderr. May be called again: the last call wins.

    `level` is a key of `LEVELS`, in any case. Lines of any role but "supervisor" carry the role before the message.
    A file without suffix gets `.log`; its folder is made. `rotation_size` is in bytes, 0 means never.
    Raises `ConfigError` for an unknown level or a file that cannot be opened.
    """
    handler = _Handler(_log_path(file) if file is not None else None, rotation_size)
    handler.setFormatter(_JournalFormatter(role) if file is None and to_journal() else _Formatter(role))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    set_level(level)


def setup_child(spec: Mapping[str, object], role: str) -> None:
    """`setup` for a child process, from the `log` of its spec: `level`, and optionally `file` and `rotation_size`."""
    file, size = spec.get("file"), spec.get("rotation_size", 0)
    setup(str(spec["level"]), None if file is None else str(file), role, size if isinstance(size, int) else 0)


def set_level(level: str) -> None:
    """Change the level of this process. Raises `ConfigError` for a name that is not in `LEVELS`."""
    number = LEVELS.get(level.lower())
    if number is None:
        raise ConfigError(f"log level: must be one of {', '.join(LEVELS)}, but is {level[:32]!r}")
    root = logging.getLogger()
    if root.level != number:  # setting it goes through all loggers there are
        root.setLevel(number)


def level_name() -> str:
    """The name of this process's level, as `set_level` takes it."""
    number = logging.getLogger().level
    return next((name for name, value in LEVELS.items() if value == number), "info")


def current_file() -> str | None:
    """Where this process logs to; None: stderr."""
    return next((handler.path for handler in logging.getLogger().handlers if isinstance(handler, _Handler)), None)


def register_secret(value: str) -> None:
    """Mask this value in every later line of this process. Values under 4 characters are left alone."""
    if len(value) >= _MIN_SECRET and value not in _secrets:
        _secrets.append(value)
        # A secret that holds another must go first, or the rest of it would stay.
        _secrets.sort(key=len, reverse=True)


def clean(text: str) -> str:
    """A text as the log shows it: registered secrets and what looks like a credential are masked."""
    for secret in _secrets:
        text = text.replace(secret, MASK)
    return redact_text(text)


def _log_path(file: str) -> str:
    folder, name = os.path.split(os.path.abspath(file))
    if not os.path.splitext(name)[1]:
        name += ".log"
    return os.path.join(folder, name)


def to_journal() -> bool:
    """Whether stderr is connected to systemd's journal, which keeps time and process of each line by itself."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    with contextlib.suppress(OSError):
        facts = os.fstat(2)
        return stream == f"{facts.st_dev}:{facts.st_ino}"
    return False


class _Formatter(logging.Formatter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._prefix = "" if role == "supervisor" else f"{role}: "

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().translate(_ESCAPES)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        micros = int(record.created % 1 * 1_000_000)
        level = _NAMES.get(record.levelno, record.levelname)
        place = "" if record.levelno == logging.INFO else f"[{record.filename}:{record.lineno}] "
        return f"[{when}.{micros:06d} +00:00] {level} {place}{self._prefix}{clean(text)}\n"


class _JournalFormatter(_Formatter):
    """Lines for the journal: each begins with its priority, and has no time."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().translate(_ESCAPES)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        priority = next((value for level, value in _PRIORITIES if record.levelno >= level), 7)
        return "".join(f"<{priority}>{line}\n" for line in clean(self._prefix + text).split("\n"))


class _Handler(logging.Handler):
    """Writes each record with one write(2) and never raises: a full disk must not stop a reader of the mount."""

    def __init__(self, path: str | None, rotation_size: int) -> None:
        super().__init__()
        self._path = path
        self._rotation_size = rotation_size if path is not None else 0
        self._identity = (0, 0)
        try:
            self._fd = self._open()
        except (OSError, ValueError) as error:
            raise ConfigError(f"--log-file {path}: cannot be opened: {error}") from error
        faulthandler.register(signal.SIGUSR1, file=self._fd, all_threads=True)

    @property
    def path(self) -> str | None:
        return self._path

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = self.format(record).encode("utf-8", "backslashreplace")
        except Exception:  # a wrong logging call is our bug: shown on stderr, but no reason to fail a request
            self.handleError(record)
            return
        with contextlib.suppress(OSError):
            self._follow()
            os.write(self._fd, data)
            if self._rotation_size and os.fstat(self._fd).st_size >= self._rotation_size:
                self._rotate()

    def close(self) -> None:
        super().close()
        if self._path is not None and self._fd >= 0:
            faulthandler.unregister(signal.SIGUSR1)
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> int:
        if self._path is None:
            return sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        # O_NONBLOCK: a named pipe without a reader must fail, not hang; files ignore it.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(self._path, flags, 0o644)
        facts = os.fstat(fd)
        self._identity = (facts.st_dev, facts.st_ino)
        return fd

    def _follow(self) -> None:
        """Open the path again if it is no longer our file (rotated by another process or by logrotate)."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            facts = os.stat(self._path)
            if (facts.st_dev, facts.st_ino) == self._identity:
                return
        fd = self._open()
        # dup2 keeps the number that faulthandler knows.
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)

    def _rotate(self) -> None:
        assert self._path is not None
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            facts = os.stat(self._path)
            if (facts.st_dev, facts.st_ino) != self._identity:
                return
            stem, suffix = os.path.splitext(self._path)
            # The inode makes the name unique within a second.
            os.rename(self._path, f"{stem}_r{_stamp()}_{facts.st_ino}{suffix}")
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._follow()
        folder, prefix = os.path.split(f"{stem}_r")
        rotated = [name for name in os.listdir(folder) if name.startswith(prefix) and name.endswith(suffix)]
        # What is named by a later time than now is older than all others: the clock was put back since.
        now = f"{prefix}{_stamp()}_~"
        rotated.sort(key=lambda name: (name < now, name))
        for name in rotated[:-_KEPT_FILES]:
            os.unlink(os.path.join(folder, name))


def _stamp() -> str:
    """The time, as it is in the name of a file that was rotated."""
    return time.strftime("%Y-%m-%d_%H-%M-%S", time.gmtime())
