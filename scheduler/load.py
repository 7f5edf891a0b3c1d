"""How much is asked of the device: the time that all that comes would take in steady runs, by the time that passes."""

from __future__ import annotations

EPOCH = 25  # bits of a time that do not matter: 34 ms


class Load:
    def __init__(self) -> None:
        self._epoch = 0
        self._asked_ns = 0  # in this epoch
        self._before_ns = 0  # in the one before it

    def ask(self, work_ns: int, now_ns: int) -> None:
        epoch = now_ns >> EPOCH
        if epoch != self._epoch:
            self._before_ns = self._asked_ns if epoch == self._epoch + 1 else 0
            self._asked_ns, self._epoch = 0, epoch
        self._asked_ns += work_ns

    def exceeds(self, sixteenths: int) -> bool:
        """Whether so much of the device's time is asked for, in this epoch already or in the last one."""
        return max(self._asked_ns, self._before_ns) > sixteenths << (EPOCH - 4)
