"""How much is asked of the device: the time that all that comes would take in steady runs, by the time that passes.

It is counted over a window that moves: what is asked in this epoch, and what was asked in that part of the one before
it that the window still covers. A burst that the device is done with within a window is not more than it can do.
"""

from __future__ import annotations

EPOCH = 25  # bits of a time that do not matter: 34 ms
WHOLE_NS = 1 << EPOCH
WITHIN = WHOLE_NS - 1  # the bits that are less than an epoch
MOST_NS = WHOLE_NS - 2_000_000  # that is asked of it before it is asked for more than it can do; less by some chance


class Load:
    def __init__(self) -> None:
        self.room_ns = 0  # if it is more than nothing, so much may be asked until that could be too much
        self._epoch = 0
        self._asked_ns = 0  # in this epoch
        self._before_ns = 0  # in the one before it

    def ask(self, work_ns: int, now_ns: int) -> None:
        if now_ns >> EPOCH != self._epoch:
            epoch = now_ns >> EPOCH
            self._before_ns = self._asked_ns if epoch == self._epoch + 1 else 0
            self._asked_ns, self._epoch = 0, epoch
        self._asked_ns += work_ns
        self.room_ns -= work_ns

    def is_over(self, now_ns: int) -> bool:
        """Whether nearly all of the device's time was asked for lately, or more."""
        if self.room_ns > 0:  # what was asked for counts less and less
            return False
        asked_ns, left_ns = self._asked_ns, WHOLE_NS - (now_ns & WITHIN)
        if now_ns >> EPOCH == self._epoch:
            asked_ns += self._before_ns * left_ns >> EPOCH
        else:
            asked_ns = asked_ns * left_ns >> EPOCH if now_ns >> EPOCH == self._epoch + 1 else 0
        self.room_ns = MOST_NS - asked_ns
        return self.room_ns < 0
