"""What the tests of the command line share."""

from __future__ import annotations

import faulthandler
import logging
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Put logging back as it was: `logs.setup` replaces the handlers of the process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    faulthandler.unregister(signal.SIGUSR1)
