"""What is known of each client, in memory that outlives the front end: which messages were taken, what of a reply was sent.

One memfd, made by a supervisor, which reads of it whether a client is still negotiating or gone, and held by all who may be
left of a daemon that is killed: the next supervisor finds its clients by what is here. Every message is taken off
its socket whole, straight into the place that it has here (`connection.py`), and a place that is free begins with a zero,
which no message does. A reply goes through a pipe that the supervisor holds, too: what is in there was not sent, what is not
there any more was. So together with the pipe, the word `sending` tells to the byte how far a client was answered.

What holds after SIGKILL between any two instructions: a message is either in its socket or here; a reply ends where the
bytes in the pipe end. Both are changed by single stores. Only of what comes with a write, and is thrown away, it may not be
known how much was taken: then it is known that it is not.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import Final, NamedTuple

from nydusd import points

from . import protocol

LAYOUT: Final = 1
"""Of this memory: a front end goes on with what it knows."""
CLIENTS_MOST: Final = 64
NUMBER: Final = Struct("=I")
"""How supervisor and front end call a client to each other."""
SLOTS: Final = 64
"""Commands of a client that are under way."""
GREETING, FLAGS, OPTION, SERVING, ENDING = range(5)
"""Phases: what comes next is the greeting that we send, flags, options or commands that are taken; or the end."""
NOTHING, OF_OPTION, OF_GREETING = 0, SLOTS + 1, SLOTS + 2
"""What is being sent, if it is not the reply to the command in a slot, which is called by 1 + its number."""
_SENDING, _PHASE, _SKIP, _SOCKET, _PIPE, _FLAGS, _SLOTS = 0, 1, 2, 4, 5, 24, 64
"""The last two in bytes, the others in words of 8 bytes."""
_TAKING: Final = 1 << 63
"""In the word of `skip`."""
_SLOT: Final = 64
_CODE, _NOTED = 8, 9
"""Words of 4 bytes in a slot, behind the message."""
_OPTION: Final = _SLOTS + SLOTS * _SLOT
SIZE: Final = 16384
"""Bytes of a client."""
_INODES: Final = Struct("=QQ")


def inodes_of(memory: int, number: int) -> tuple[int, int]:
    """`Kept.inodes` of a client in this memfd."""
    socket, pipe = _INODES.unpack(os.pread(memory, _INODES.size, number * SIZE + 8 * _SOCKET))
    return socket, pipe


class Sending(NamedTuple):
    """`at`: bytes of the reply that have left the pipe before `piece` bytes were put there; `what`: see `NOTHING`."""

    at: int
    piece: int
    what: int


class Kept:
    """A client's part of the memory."""

    def __init__(self, view: memoryview) -> None:
        """`view`: `SIZE` bytes, all zeros for a client that is new."""
        self._bytes = view
        self._words = view[:_SLOTS].cast("Q")
        self.option = view[_OPTION : _OPTION + protocol.OPTION.size + protocol.OPTION_MOST]
        self.flags = view[_FLAGS : _FLAGS + protocol.CLIENT_FLAGS.size]

    @property
    def sending(self) -> Sending:
        word = self._words[_SENDING]
        return Sending(word >> 32, word >> 8 & 0xFFFFFF, word & 0xFF)

    @sending.setter
    def sending(self, now: Sending) -> None:
        self._words[_SENDING] = now.at << 32 | now.piece << 8 | now.what

    @property
    def inodes(self) -> tuple[int, int]:
        """Of the client's socket and pipe, by which they are found with whoever holds them; 0, 0 for one that is gone."""
        return self._words[_SOCKET], self._words[_PIPE]

    @inodes.setter
    def inodes(self, now: tuple[int, int]) -> None:
        self._words[_SOCKET], self._words[_PIPE] = now

    @property
    def phase(self) -> int:
        return self._words[_PHASE]

    @phase.setter
    def phase(self, now: int) -> None:
        self._words[_PHASE] = now

    @property
    def skip(self) -> int:
        """Bytes of a write, which is refused, that are still to come."""
        return self._words[_SKIP] & ~_TAKING

    @skip.setter
    def skip(self, count: int) -> None:
        self._words[_SKIP] = count

    def begin_skip(self) -> None:
        """Some of these bytes are about to be taken: how many is not known before `skip` says it."""
        self._words[_SKIP] |= _TAKING

    @property
    def skips_unknown(self) -> bool:
        """Whether a predecessor was killed while it took some of them."""
        return self._words[_SKIP] & _TAKING != 0

    def request(self, slot: int) -> memoryview:
        """The place of a command's bytes."""
        start = _SLOTS + slot * _SLOT
        return self._bytes[start : start + protocol.REQUEST.size]

    def is_taken(self, slot: int) -> bool:
        return self._bytes[_SLOTS + slot * _SLOT] != 0

    def free(self, slot: int) -> None:
        """Its reply was sent: the first store says so, whatever comes of the second.

        In the other order a successor would count once more what came with the command, and throw away others instead.
        """
        fields = self._fields(slot)
        fields[0] = 0
        points.reach("nbd: slot free, still noted")
        fields[_NOTED] = 0

    def make_ready(self, slot: int) -> None:
        """A command is about to be taken into a free place: who was killed in `free` may have left something there."""
        self._fields(slot)[_NOTED] = 0

    def code(self, slot: int) -> int:
        """The errno that is being sent as the reply to a command."""
        return self._fields(slot)[_CODE]

    def set_code(self, slot: int, code: int) -> None:
        self._fields(slot)[_CODE] = code

    def is_noted(self, slot: int) -> bool:
        """Whether `skip` has what comes with the command."""
        return self._fields(slot)[_NOTED] != 0

    def note(self, slot: int) -> None:
        self._fields(slot)[_NOTED] = 1

    def _fields(self, slot: int) -> memoryview:
        start = _SLOTS + slot * _SLOT
        return self._bytes[start : start + _SLOT].cast("I")
