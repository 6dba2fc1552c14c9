"""The door of this package for the command line."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from nydusd import turns
from nydusd.cli.options import BlobfsOptions, ErofsOptions, FuseOptions, NbdOptions, Options, SingletonOptions
from nydusd.nursery import client as nursery
from nydusd.supervisor.family import CannotStartError
from nydusd.supervisor.fuse import FuseDaemon
from nydusd.waits import EndedError

if TYPE_CHECKING:
    from nydusd.config import Config
    from nydusd.config.blob_entry import BlobEntry
    from nydusd.forkserver.client import ForkServer
    from nydusd.supervisor.daemon import Supervisor

log = logging.getLogger(__name__)


def run(options: Options, config: Config, entries: list[BlobEntry], fork_server: ForkServer) -> int:
    """Run a daemon until it is told to stop. Raises NydusError when it cannot start; nothing is left behind then."""
    if isinstance(options, SingletonOptions) and options.fscache is not None:
        from nydusd.supervisor.fscache import FscacheDaemon

        return _run(FscacheDaemon(options, entries, fork_server))
    if isinstance(options, SingletonOptions):
        from nydusd.supervisor.singleton import Singleton

        return _run(Singleton(options, entries, fork_server))
    if isinstance(options, ErofsOptions):
        from nydusd.supervisor.selection import daemon_for

        return _run(daemon_for(options, config, fork_server))
    if isinstance(options, NbdOptions):
        from nydusd.supervisor.nbd import NbdDaemon

        return _run(NbdDaemon(options, config, fork_server))
    if isinstance(options, BlobfsOptions):
        from nydusd.supervisor.blobfs import BlobfsDaemon

        return _run(BlobfsDaemon(options, config, fork_server))
    assert isinstance(options, FuseOptions)
    return _run(FuseDaemon(options, config, fork_server))


def _run(supervisor: Supervisor) -> int:
    """Run a daemon until it is told to stop. Raises NydusError when it cannot start; nothing of it is left behind then.

    One that has served, or has taken over, ends by an error as by a SIGKILL: its mount is the next one's. So does one that is
    told to end while it waits to take over.
    """
    logging.getLogger().addHandler(supervisor.errors)
    turns.be_short()
    try:
        supervisor.start()
        supervisor.run(lambda: nursery.start_if_useful(for_one=supervisor.is_looked_after), _load_report)
    except EndedError as e:
        log.info("%s", e)
        supervisor.leave()
    except CannotStartError:
        raise
    except BaseException:
        supervisor.fail()
        raise
    finally:
        supervisor.stop()
        # Who takes over may be waiting to come from there, and ends what still has the session open: so at once.
        if not supervisor.handover.leaving:
            nursery.end_if_last()
        logging.getLogger().removeHandler(supervisor.errors)
    log.info("stopped")
    return 0


def _load_report() -> None:
    """While what is on disk is what we run: it may be another version when an operator asks for the first time."""
    from nydusd.supervisor import report  # noqa: F401
