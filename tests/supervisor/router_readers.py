"""Two readers of the router, what they were answered, and a cache folder that is full."""

from __future__ import annotations

from tests.supervisor.world import CHUNKS, World

A, B = b"fuse-0-1", b"fuse-1-1"


def codes(world: World) -> list[tuple[int, int]]:
    """(number, errno) of the answers so far, in order."""
    return [(number, code) for _client, number, code, _slot in world.answers]


def full_disk(world: World, chunk: int = CHUNKS - 1) -> None:
    """From now on, chunks of `plain` find no room in the cache folder."""
    world.ask(A, 900, world.plain, chunk, 1)
    world.fill_next(unstored=range(CHUNKS))
    world.fill_next()
    world.router.release(world.leases.pop())
    assert world.plain.uses_slots
    world.answers.clear()
