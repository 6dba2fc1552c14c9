"""The command `nydusd`: from arguments to a running supervisor.

Runs in the process that becomes the supervisor. Its start is inside the time that clients wait for the API socket, so
nothing heavy is imported before it is known to be needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nydusd.cli.arguments import HelpAsked, VersionAsked, parse_arguments
from nydusd.cli.options import FuseOptions, NbdOptions, Options, SingletonOptions
from nydusd.errors import ConfigError, NydusError, UnsupportedError
from nydusd.version import build_info, version_text

if TYPE_CHECKING:
    from nydusd.config import Config
    from nydusd.config.blob_entry import BlobEntry
    from nydusd.forkserver.client import ForkServer

_CACHEFILES = "/dev/cachefiles"
AUTH_VARIABLE = "IMAGE_PULL_AUTH"


def main(argv: Sequence[str] | None = None, fork_server: ForkServer | None = None) -> int:
    """Run the command. The exit status: 0 after a normal end, 1 for an error, 2 for a wrong flag or configuration key.

    `fork_server`: one that is there already, which is ended.
    """
    try:
        return _main(sys.argv[1:] if argv is None else argv, fork_server)
    except VersionAsked:
        return _show(version_text("nydusd"))
    except HelpAsked as help_asked:
        return _show(str(help_asked))
    except NydusError as error:
        from nydusd.logs import clean

        if error.traceback:
            _print_traceback(error)
        sys.stderr.write(f"Error: {' '.join(clean(str(error)).split())}\n")
        return error.exit_code
    except Exception as error:
        _print_traceback(error)
        return 1


def _main(argv: Sequence[str], fork_server: ForkServer | None) -> int:
    try:
        options = parse_arguments(argv)
        if fork_server is None:
            from nydusd.forkserver.client import ForkServer

            fork_server = ForkServer()  # it loads what children need while we load what the supervisor needs
        return _run(options, fork_server)
    finally:
        if fork_server is not None:
            fork_server.close()


def _run(options: Options, fork_server: ForkServer) -> int:
    import logging

    from nydusd import logs

    config, entries = _configuration(options)
    if isinstance(options, FuseOptions):
        options = _complete(options)
    logs.setup(options.log_level, options.log_file, "supervisor", options.log_rotation_size << 20)
    if (file := logs.current_file()) is not None:
        fork_server.stderr_to(os.path.abspath(file))
    _log_start(options, config)

    from nydusd.supervisor.main import run

    try:
        return run(options, config, entries, fork_server)
    except Exception:
        if options.log_file is not None:  # else it would stand twice on stderr
            logging.getLogger(__name__).exception("ended by an error")
        raise


def _complete(options: FuseOptions) -> FuseOptions:
    from nydusd.cli.mountpoint import resolve_mountpoint

    if options.shared_dir is not None:
        raise UnsupportedError("--shared-dir is not supported yet: only images can be served")
    if options.writable:
        raise UnsupportedError("--writable is not supported yet: images are mounted read-only")
    if options.dedup_db is not None:
        raise UnsupportedError("--dedup-db is not supported yet: leave it out, chunks are then fetched for each blob")
    if isinstance(options, NbdOptions):
        return replace(options, socket=os.path.abspath(options.socket))
    return replace(options, mountpoint=resolve_mountpoint(options.mountpoint))


def _configuration(options: Options) -> tuple[Config, list[BlobEntry]]:
    """The configuration of an image, or the images of a singleton. Raises ConfigError."""
    from nydusd import config, logs

    if isinstance(options, FuseOptions):
        return _load(options), []
    assert isinstance(options, SingletonOptions)
    if options.fscache is not None and not os.path.isdir(options.fscache):
        raise ConfigError(f"--fscache {options.fscache}: must be an existing folder")
    if options.fscache is not None and not os.path.exists(_CACHEFILES):
        raise UnsupportedError(
            f"--fscache {options.fscache}: fscache is not available on this kernel: it has no {_CACHEFILES}; use `nydusd fuse`"
        )
    if options.config is None:
        return config.bare_config(), []
    from nydusd.config.blob_entry import parse_singleton_config
    from nydusd.config.file import read_named_file

    entries = parse_singleton_config(read_named_file(options.config, 16 << 20, options.config), options.config)
    for entry in entries:
        for secret in config.secret_values(entry.config):
            logs.register_secret(secret)
    return config.bare_config(), entries


def _load(options: FuseOptions) -> Config:
    from nydusd import config, logs

    if options.localfs_dir is not None:
        return config.localfs_dir_config(options.localfs_dir)
    if options.config is None:
        return config.bare_config()
    loaded = config.load_config_file(options.config)
    # Not left there: every process that we start would have it.
    auth = os.environ.pop(AUTH_VARIABLE, None)
    if auth:
        loaded = config.with_registry_auth(loaded, auth, AUTH_VARIABLE)
    for secret in config.secret_values(loaded):
        logs.register_secret(secret)
    return loaded


def _log_start(options: Options, config: Config) -> None:
    import logging

    from nydusd.cli.limits import raise_nofile_limit

    log = logging.getLogger(__name__)
    log.info(
        "nydusd %(package_ver)s, commit %(git_commit)s, built %(build_time)s (%(profile)s, %(rustc)s)", build_info()
    )
    for remark in config.remarks:
        log.warning("%s: %s", options.config, remark)
    if isinstance(options, FuseOptions) and options.bootstrap is None and options.apisock is None:
        log.warning("no --bootstrap and no --apisock: nothing is mounted and nothing can be; give one of them")
    problem = raise_nofile_limit(options.rlimit_nofile)
    if problem is not None:
        log.warning("%s", problem)


def _show(text: str) -> int:
    """Print what was asked for; the exit status."""
    from nydusd.cli.exit_status import exit_status, writing

    def work() -> None:
        with writing():
            print(text, end="")

    return exit_status(work, str)


def _print_traceback(error: Exception) -> None:
    import traceback

    from nydusd.logs import clean

    sys.stderr.write(clean("".join(traceback.format_exception(error))))
