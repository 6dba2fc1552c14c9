"""Whose name to give at a registry: the configuration's, or that of docker's config.json and its helpers.

Run by fetch workers only: no other process of the daemon reads these files. Nothing is written, nothing is logged. The
file is read again when it has changed; a helper is asked again after some minutes and whenever what it gave was
rejected: that is how short-lived credentials are renewed without a restart.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from typing import Final

from nydusd.logs import register_secret

log = logging.getLogger(__name__)

HELPER_SECONDS: Final = 10.0
_HELPER_LIFE: Final = 300.0
_HELPER_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_MAX_FILE: Final = 1 << 20
_DOCKER_HUB: Final = frozenset(("docker.io", "index.docker.io", "registry-1.docker.io"))
_HUB_KEY: Final = "https://index.docker.io/v1/"


@dataclass(frozen=True, slots=True)
class Credentials:
    """`basic` is base64 of `user:password`; `identity` a refresh token, which only a token server takes."""

    basic: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.basic or self.identity)

    @property
    def name(self) -> str:
        """Tells credentials apart without giving them away."""
        return hashlib.sha256(f"{self.basic}\0{self.identity}".encode()).hexdigest()[:24] if self else "anonymous"


NOBODY: Final = Credentials()


class CredentialSource:
    """The credentials for one registry host. `auth` is base64 of `user:password` or empty."""

    def __init__(self, host: str, auth: str) -> None:
        self._host = host
        self._given = _registered(Credentials(basic=auth.strip()))
        self._given_rejected = False
        self._file_state: tuple[int, int, int] | None = None
        self._file: dict[str, object] = {}
        self._helped = NOBODY
        self._helped_until = 0.0
        self._complaint = ""

    def current(self) -> Credentials:
        """What to use now; `NOBODY` where there is nothing."""
        if self._given and not self._given_rejected:
            return self._given
        return self._from_docker() or self._given

    def rejected(self, credentials: Credentials) -> bool:
        """The registry or its token server did not take these: True if `current` gives others now."""
        if credentials == self._given:
            self._given_rejected = True
        self._helped_until = 0.0
        self._file_state = None
        return self.current() != credentials

    def _from_docker(self) -> Credentials:
        """What docker would use. Something wrong with its files is logged once, and is as if there was nothing."""
        try:
            config = self._config()
            helper = _text(_table(config, "credHelpers"), *_keys(self._host)) or _text(config, "credsStore")
            if helper and (found := self._ask(helper)):
                return found
            return _registered(_entry(_table(config, "auths"), self._host))
        except (OSError, ValueError, RecursionError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            if reason != self._complaint:
                self._complaint = reason
                log.warning("docker credentials for %s: %s", self._host, reason)
            return NOBODY

    def _config(self) -> dict[str, object]:
        folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
        path = os.path.join(folder, "config.json")
        try:
            facts = os.stat(path)
        except FileNotFoundError:
            self._file_state, self._file = None, {}
            return self._file
        state = (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        if state != self._file_state:
            # O_NONBLOCK: opening a named pipe would wait for its writer.
            with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
                raw = file.read(_MAX_FILE + 1) or b""
            try:
                parsed = json.loads(raw) if len(raw) <= _MAX_FILE else None
            except (ValueError, RecursionError):
                parsed = None
            if not isinstance(parsed, dict):
                raise ValueError(f"{path} is no JSON object")
            self._file, self._file_state = parsed, state
            self._helped_until = 0.0
        return self._file

    def _ask(self, helper: str) -> Credentials:
        """What a credential helper says. Raises `ValueError`, without anything that the helper printed."""
        if time.monotonic() < self._helped_until:
            return self._helped
        if not _HELPER_NAME.fullmatch(helper):
            raise ValueError(f"{helper[:64]!r} is no name of a credential helper")
        program = f"docker-credential-{helper}"
        found = NOBODY
        for key in _keys(self._host):
            try:
                run = subprocess.run(
                    [program, "get"],
                    input=key.encode(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    timeout=HELPER_SECONDS,
                    check=False,
                )
                reply = json.loads(run.stdout[:_MAX_FILE]) if run.returncode == 0 else {}
            except subprocess.TimeoutExpired:
                raise ValueError(f"{program} gave no answer in {HELPER_SECONDS:g} s") from None
            except (ValueError, RecursionError):
                raise ValueError(f"{program} gave no JSON") from None
            user, secret = _text(reply, "Username"), _text(reply, "Secret")
            if secret:
                found = Credentials(identity=secret) if user == "<token>" else Credentials(basic=_pair(user, secret))
                break
        self._helped, self._helped_until = _registered(found), time.monotonic() + _HELPER_LIFE
        return found


def _keys(host: str) -> list[str]:
    """The names under which docker keeps the credentials for a host, best first."""
    return [_HUB_KEY, *sorted(_DOCKER_HUB)] if host in _DOCKER_HUB else [host, f"https://{host}"]


def _entry(auths: dict[str, object], host: str) -> Credentials:
    """The credentials in the `auths` table of config.json."""
    wanted = _DOCKER_HUB if host in _DOCKER_HUB else {host}
    for key in auths:
        if key.rpartition("://")[2].partition("/")[0] not in wanted:
            continue
        entry = _table(auths, key)
        if identity := _text(entry, "identitytoken"):
            return Credentials(identity=identity)
        if auth := _text(entry, "auth"):
            return Credentials(basic=auth.strip())
        if user := _text(entry, "username"):
            return Credentials(basic=_pair(user, _text(entry, "password")))
    return NOBODY


def _table(table: object, key: str) -> dict[str, object]:
    value = table.get(key) if isinstance(table, dict) else None
    return value if isinstance(value, dict) else {}


def _text(table: object, *keys: str) -> str:
    """The first of the values that is a text and not empty."""
    values = [table.get(key) for key in keys] if isinstance(table, dict) else []
    return next((value for value in values if isinstance(value, str) and value), "")


def _pair(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _registered(credentials: Credentials) -> Credentials:
    """Make sure that no log line of this process shows them."""
    register_secret(credentials.identity)
    if credentials.basic:
        register_secret(credentials.basic)
        try:
            register_secret(base64.b64decode(credentials.basic).decode().partition(":")[2])
        except ValueError:
            return NOBODY
    return credentials
