"""Access keys of object stores: from the configuration, or from a file that somebody else renews. Run by fetch workers.

The file is looked at before each request and read again when it has changed, so that keys which end soon (those of a
role, with a session token) are replaced without a restart. Nothing is written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from nydusd.errors import CredentialsRejectedError
from nydusd.logs import register_secret

log = logging.getLogger(__name__)

_MAX_FILE = 64 << 10
_NAMES = {
    "key_id": ("aws_access_key_id", "access_key_id"),
    "secret": ("aws_secret_access_key", "access_key_secret"),
    "session_token": ("aws_session_token", "session_token", "security_token"),
}


@dataclass(frozen=True, slots=True)
class Keys:
    """One set of keys. Without a `key_id` requests are not signed."""

    key_id: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.key_id)


class KeySource:
    """The keys to sign with now: those of the file `path` if one is named, else always `fixed`.

    The file has the form of AWS's own: a section `[default]` (or only one, of any name) with `aws_access_key_id`,
    `aws_secret_access_key` and perhaps `aws_session_token`; for OSS the names `access_key_id`, `access_key_secret` and
    `security_token` are known, too.
    """

    def __init__(self, fixed: Keys, path: str = "") -> None:
        self._keys = fixed
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._complained = False
        _register(fixed)

    def current(self) -> Keys:
        """The keys as of now. A file that cannot be read or understood any more leaves the last ones in force.

        Raises `CredentialsRejectedError` if there never were any in it.
        """
        if not self._path:
            return self._keys
        try:
            stat = os.stat(self._path)
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if state != self._seen:
                self._keys = _parse(_read(self._path))
                self._seen, self._complained = state, False
                _register(self._keys)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if self._seen is None:
                raise CredentialsRejectedError(f"credentials_file {self._path}: {reason}") from error
            if not self._complained:
                log.warning("credentials_file %s: %s; the keys read before stay in use", self._path, reason)
                self._complained = True
        return self._keys


def _register(keys: Keys) -> None:
    """Make sure that no log line of this process shows them."""
    for secret in (keys.key_id, keys.secret, keys.session_token):
        register_secret(secret)


def _read(path: str) -> str:
    # O_NONBLOCK: opening a named pipe would wait for its writer.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        raw = file.read(_MAX_FILE + 1) or b""
    if len(raw) > _MAX_FILE:
        raise ValueError(f"is longer than {_MAX_FILE} bytes")
    return raw.decode()


def _parse(text: str) -> Keys:
    """The keys in a file. Raises `ValueError`, without a value of the file in its text."""
    import configparser

    parser = configparser.RawConfigParser(default_section="", strict=False)
    try:
        parser.read_string(text)
    except configparser.Error:
        raise ValueError("is no list of [sections] with lines 'name = value'") from None
    sections = parser.sections()
    if "default" in sections or len(sections) == 1:
        section: Mapping[str, str] = parser["default" if "default" in sections else sections[0]]
    else:
        raise ValueError(f"has {len(sections)} sections and none is [default]")
    found = {
        name: next((section[key].strip() for key in keys if section.get(key)), "") for name, keys in _NAMES.items()
    }
    if not found["key_id"] or not found["secret"]:
        raise ValueError("has no aws_access_key_id or no aws_secret_access_key")
    return Keys(**found)
