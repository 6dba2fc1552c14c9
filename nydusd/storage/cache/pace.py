"""How far and how fast is fetched ahead of the readers of an image: as the configuration of its mount says."""

from __future__ import annotations

_BURST = 16 << 20
_TINY = 1e-3
"""Seconds that are not worth waiting: without that, who waited as told may be told, by rounding, to wait on."""
_LEAST_BATCH = 128 << 10
_AMPLIFY = 1 << 20


class Limiter:
    """A leaky bucket in bytes per second; 0 = no limit. User reads add to its debt and never wait."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._debt = 0.0
        self._at = 0.0

    def _leak(self, now: float) -> None:
        self._debt = max(0.0, self._debt - (now - self._at) * self._rate)
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until more may be fetched."""
        if not self._rate:
            return 0.0
        self._leak(now)
        # The capacity is a tenth of a second's worth, at most the burst: a higher one would make a low limit no limit.
        over = self._debt - min(self._rate / 10, _BURST)
        wait = over / self._rate
        return wait if wait > _TINY else 0.0

    def spend(self, now: float, size: int) -> None:
        if self._rate:
            self._leak(now)
            self._debt += size


class Pace:
    """`batch_size` is plain bytes of a batch of prefetch, `amplify` stored bytes that a user's miss takes along.

    The limiter counts stored bytes, those of all blobs of the image.
    """

    def __init__(self, batch_size: int = 0, bandwidth: int = 0, amplify: int = _AMPLIFY) -> None:
        self.batch_size = max(batch_size, _LEAST_BATCH)
        self.limiter = Limiter(bandwidth)
        self.amplify = amplify


DEFAULT_PACE = Pace()
"""Of a blob that no image has said anything about."""
