"""Loaded by the interpreter itself, first of all, in each process of a daemon whose clock a test puts forth and back.

All that asks for the time of day in a daemon is Python, and gets it so many seconds from the true one as the file says now.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Self

_FILE = os.environ.get("NYDUSD_TEST_CLOCK", "")
_time, _time_ns, _gmtime, _localtime = time.time, time.time_ns, time.gmtime, time.localtime


def _shift() -> int:
    with open(_FILE, "rb") as file:
        return int(file.read())


def _of_now(convert: object, seconds: float | None) -> time.struct_time:
    assert callable(convert)
    found = convert(_time() + _shift() if seconds is None else seconds)
    assert isinstance(found, time.struct_time)
    return found


class _Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Self:
        return cls.fromtimestamp(_time() + _shift(), tz)


if _FILE:
    vars(time).update(
        time=lambda: _time() + _shift(),
        time_ns=lambda: _time_ns() + _shift() * 10**9,
        gmtime=lambda seconds=None: _of_now(_gmtime, seconds),
        localtime=lambda seconds=None: _of_now(_localtime, seconds),
    )
    vars(datetime)["datetime"] = _Datetime
