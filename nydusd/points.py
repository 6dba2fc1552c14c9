"""Named points: where a test may have a process killed, between two steps that must each leave something true behind.

A point is one call of an empty function; nothing here kills anybody, and no setting changes that. The tests put another
function in its place before a process loads anything else (`tests/killing`). A point stands where state changes hands:
between data and the mark that it is there, before and after an answer, at each step of a takeover. None stands where a front
end answers a read of cached data. Any process runs it; nothing here outlives a call.
"""

from __future__ import annotations


def reach(_name: str) -> None:
    """The process is at this point. Names are unique, and literal where they are given: the tests find them by that."""
