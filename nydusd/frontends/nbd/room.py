"""How many bytes of replies the clients of an export may have us keep for them, all together.

A client may have as much as is left for all others then: a few who take nothing never use up what there is, and who has less
comes before who has more. One read of a client that has nothing else under way is always begun, however little is left: so
nobody waits for another, who may take his replies never.

Dies with the front end: what its successor has to answer is counted anew, as it is begun.
"""

from __future__ import annotations

_ALL_MOST = 256 << 20
"""Bytes of replies that clients have not taken, or that their reads under way will give."""
_CLIENT_MOST = 64 << 20
"""The same of one client."""


class Room:
    """`used`: bytes, of all clients."""

    def __init__(self) -> None:
        self.used = 0

    def has(self, held: int, more: int) -> bool:
        """Whether a client that holds so many bytes may begin a read of so many."""
        return not held or held + more <= min(_CLIENT_MOST, _ALL_MOST - self.used)
