"""The exit status of a command that does one thing and ends; what it prints for an error, and when nobody reads its output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nydusd.errors import NydusError


def exit_status(work: Callable[[], object], shown: Callable[[str], str]) -> int:
    """Do the work: 0, or what its error says; that is printed as `shown` makes it."""
    try:
        work()
    except NydusError as error:
        print(f"Error: {shown(str(error))}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("Error: it needs more memory than there is", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _write_no_more()
        return 1
    return 0


@contextmanager
def writing() -> Iterator[None]:
    """What is done here writes to standard output, and that is written when it is left.

    Raises BrokenPipeError when nobody reads it any more, NydusError when it cannot be written for another reason.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None where it was closed before we were started
                sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _write_no_more()
        raise NydusError(f"standard output: {error.strerror}") from error


def _write_no_more() -> None:
    """Python's own flush at exit must not complain about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
