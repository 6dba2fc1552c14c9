"""Operations of the API that steer the daemon: state machine, hand-over, error events, settings at run time.

Runs in the supervisor. Errors have the names that clients know inside; the API process puts those around them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nydusd import points
from nydusd.errors import CacheError, ConfigError, NydusError
from nydusd.ipc.messages import Json
from nydusd.logs import clean
from nydusd.redact import MASK, redact_url
from nydusd.storage.api.image import identity_of
from nydusd.supervisor import handover
from nydusd.supervisor.checked import read_checked, write_checked
from nydusd.supervisor.mount_table import known_place
from nydusd.version import GIT_COMMIT

if TYPE_CHECKING:
    from nydusd.config import Config
    from nydusd.supervisor.daemon import Supervisor
    from nydusd.supervisor.images import Image

log = logging.getLogger(__name__)

SETTINGS: Final = ("registry_auth", "proxy_url", "dragonfly_scheduler_endpoint")
_SETTINGS: Final = "settings.json"
"""In the run-time folder, readable for the daemon's user only: what was set, for a successor."""
_MAX_ERRORS, _MAX_BYTES = 500, 50 * 1024
_PATIENCE = 1.0
"""Seconds that who keeps our session may take: nobody is served meanwhile."""
_KINDS = {errno.ENOENT: "NotFound", errno.ECONNREFUSED: "ConnectionRefused", errno.EACCES: "PermissionDenied"}


class StateError(NydusError):
    """The state of the daemon does not allow this."""

    rest_status = 400


class NotReadyError(NydusError):
    """The daemon cannot do this yet."""

    rest_status = 503


class NotHereError(NydusError):
    """This daemon does not do this."""

    rest_status = 501

    def __init__(self) -> None:
        super().__init__("Unsupported")


class ErrorRing(logging.Handler):
    """Keeps the last errors of the supervisor, as lines with their time: at most 500, and 50 KiB."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: deque[str] = deque()
        self._bytes = 0
        self._total = 0

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{formatdate(time.time(), usegmt=True)} - {clean(record.getMessage())}"[: _MAX_BYTES // 8]
        self._lines.append(line)
        self._total += 1
        self._bytes += len(line.encode(errors="replace"))
        while len(self._lines) > _MAX_ERRORS or self._bytes > _MAX_BYTES:
            self._bytes -= len(self._lines.popleft().encode(errors="replace"))

    def shown(self) -> Json:
        return {
            "max_errors": _MAX_ERRORS,
            "total_errors": self._total,
            "max_size": _MAX_BYTES,
            "total_size": self._bytes,
            "errors": list(self._lines),
        }


def _start(daemon: Supervisor, _request: Json) -> None:
    if daemon.state != "READY":
        raise StateError('UnexpectedEvent("Start")')
    if daemon.handover.waiting:
        daemon.handover.told_to_start = True  # we serve in any case, but say it only when it is true
    else:
        daemon.state = "RUNNING"


def _takeover(daemon: Supervisor, _request: Json) -> None:
    """Whoever started us wants us to take over, and sends what he keeps for us.

    It is needed if no process was left of the one that crashed. Else that is done: we had it from our front ends.
    """
    if daemon.state != "INIT":
        raise StateError('UnexpectedEvent("Takeover")')
    if daemon.options.supervisor is None:
        raise NydusError('UpgradeManager("MissingSupervisorPath")')
    with _connected(daemon.options.supervisor) as wire:
        try:
            sent = handover.receive(wire, daemon.session_device())
        except OSError as e:
            raise NydusError(f"UpgradeManager({json.dumps(_error_text('Recv', e))})") from e
        except NydusError as e:
            raise NydusError(f"UpgradeManager({json.dumps(str(e))})") from e
    points.reach("handover: state received")
    daemon.take_sent(sent)
    daemon.state = "READY"


def _sendfd(daemon: Supervisor, _request: Json) -> None:
    """Have the session kept by who listens: as long as he does, the mount lives, whatever becomes of us."""
    if daemon.state == "INIT":
        raise NotReadyError("NotReady")
    if daemon.options.supervisor is None:
        raise NotHereError
    with _connected(daemon.options.supervisor) as wire:  # in any case: who listens there waits until somebody does
        fd = daemon.session_fd()
        if fd < 0:
            raise NotHereError
        try:
            state = json.dumps(_state_to_keep(daemon)).encode()
            points.reach("handover: before the state is sent")
            sent = socket.send_fds(wire, [state], [fd])
            wire.sendall(state[sent:])
            points.reach("handover: state sent")
        except OSError as e:
            raise NydusError(f"UpgradeManager({json.dumps(_error_text('Send', e))})") from e


def _state_to_keep(daemon: Supervisor) -> Json:
    """What is kept with the fd. All else a successor finds in the run-time folder."""
    state: Json = {"version": handover.VERSION, "readable_by": handover.READABLE_BY}
    return state | {"nydusd": GIT_COMMIT, "serves": daemon.options.serves} | daemon.session_state()


def _connected(path: str) -> socket.socket:
    """A line to who keeps our session. Raises NydusError."""
    wire = socket.socket(socket.AF_UNIX)
    wire.settimeout(_PATIENCE)
    try:
        wire.connect(path)
    except OSError as e:
        wire.close()
        raise NydusError(f"UpgradeManager({json.dumps(_error_text('CreateUnixStream', e))})") from e
    return wire


def _error_text(what: str, error: OSError) -> str:
    kind = _KINDS.get(error.errno or 0, "Other")
    cause = f"Os {{ code: {error.errno}, kind: {kind}, message: {json.dumps(os.strerror(error.errno or 0))} }}"
    return f"StorageBackendError({what}({cause}))"


def _events(daemon: Supervisor, _request: Json) -> Json:
    return daemon.errors.shown()


def _get_config(daemon: Supervisor, request: Json) -> Json:
    """What was set at run time; secrets are told of, not told, and so are those in URLs."""
    wanted = request.get("id")
    found: Json = {}
    for name, values in daemon.settings.items():
        for key, value in values.items():
            if wanted is None or wanted == name:
                shown = MASK if key == "registry_auth" else redact_url(value)
                found[key if wanted is not None else f"{name}:{key}"] = shown
    return found


def _set_config(daemon: Supervisor, request: Json) -> None:
    """Change how blobs of one image are fetched from now on. Raises NydusError, and then nothing is changed."""
    name = str(request.get("id") or "")
    values: dict[str, str] = request["values"]
    if not set(values) <= set(SETTINGS):
        raise NydusError("ResponsePayloadType")
    _keep_out_of_logs(values)
    try:
        for image in daemon.images.values():
            if _means(daemon, name, image.place):
                image.configure(values)
    except ConfigError as e:
        raise NydusError(f"Other({json.dumps(str(e), ensure_ascii=False)})") from e
    daemon.settings.setdefault(name, {}).update(values)
    remember(daemon)


def _means(daemon: Supervisor, name: str, place: str) -> bool:
    """Whether what is set for `name` is so for the image at `place`, however that is spelled.

    Images of a singleton have the root as their id together, as in the reference.
    """
    meant = known_place(f"/{name}")
    return meant == known_place(f"/{place}") or (daemon.blobs is not None and meant == "/")


def as_set(daemon: Supervisor, place: str, config: Config, *, counts: bool) -> Config:
    """How an image of this configuration is fetched at `place`: with what was set for that, where it does not say it itself.

    `counts`: what it says holds from now on, also for a successor: it is about to be mounted.
    """
    from nydusd.config import settings_of, with_settings

    said = settings_of(config)
    overruled = False
    for name, values in daemon.settings.items():
        if not _means(daemon, name, place):
            continue
        newer = {key: value for key, value in said.items() if values.get(key, value) != value}
        if counts and newer:
            values.update(newer)
            overruled = True
        try:
            config = with_settings(config, {key: value for key, value in values.items() if key not in said})
        except ConfigError as e:  # nothing was mounted there that would have refused it
            log.warning("what was set for %s is not used: %s", name, e)
    if overruled:
        remember(daemon)
    return config


def _keep_out_of_logs(values: Mapping[str, str]) -> None:
    from nydusd.config import settings_secrets
    from nydusd.logs import register_secret

    for secret in settings_secrets(values):
        register_secret(secret)


def remember(daemon: Supervisor) -> None:
    """Write down what is set, for a successor."""
    try:
        noted = {"settings": daemon.settings, "config": _identity(daemon.options.config)}
        write_checked(Path(daemon.run_dir) / _SETTINGS, noted)
    except CacheError as e:
        log.warning("%s; a successor will not know what was set", e)


def _identity(path: str | None) -> str | None:
    """Tells a file from any other and from what it was; None if there is none."""
    with contextlib.suppress(OSError):
        return None if path is None else identity_of(os.stat(path))
    return None


def recall(daemon: Supervisor) -> Callable[[Image], None]:
    """What a supervisor that was killed was told at run time; gives what sets it for an image once more.

    But not for the image of the command line if the file of the configuration is another since then.
    """
    path = Path(daemon.run_dir) / _SETTINGS
    try:
        noted = read_checked(path)
        settings: dict[str, dict[str, str]] = noted["settings"]
    except (CacheError, KeyError) as e:
        if not isinstance(e, CacheError) or e.cause_errno != errno.ENOENT:
            log.warning("what was set at run time is lost: %s", e)
        return lambda image: None
    config = _identity(daemon.options.config)
    newer = config is not None and config != noted.get("config", config)  # no time is compared: clocks are put back
    daemon.settings = settings
    for values in settings.values():
        _keep_out_of_logs(values)

    def recalled(image: Image) -> None:
        for name, values in settings.items():
            if _means(daemon, name, image.place) and not (newer and image.given):
                with contextlib.suppress(ConfigError):  # as it was when it was set
                    image.configure(values)

    return recalled


OPS: dict[str, Callable[[Supervisor, Json], object]] = {
    "start": _start,
    "takeover": _takeover,
    "sendfd": _sendfd,
    "events": _events,
    "get_config": _get_config,
    "set_config": _set_config,
}
