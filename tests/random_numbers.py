"""The random numbers of a test depend on its name alone: not on what its worker ran before, nor on how long that took.

`pytest --numbers 1` draws others in all tests. Hypothesis begins each example anew, so that one that fails fails again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import numpy as np
from hypothesis import register_random


class Numbers:
    """What tests draw arrays from. `seed`, `getstate` and `setstate` are what hypothesis asks of a source."""

    def __init__(self) -> None:
        self.variant = 0
        self.name = ""
        self.seed(0)

    def begin(self, name: str) -> None:
        """From here on the numbers of the test, or of the fixture, of that name."""
        self.name = name
        self.seed(0)

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """The numbers of a fixture, whichever test asks for it first; then the test's go on."""
        before = self.name, self.rng
        self.begin(name)
        try:
            yield
        finally:
            self.name, self.rng = before

    def seed(self, example: object) -> None:
        self.rng = np.random.default_rng([crc32(self.name.encode()), crc32(str(example).encode()), self.variant])

    def getstate(self) -> np.random.Generator:
        return self.rng

    def setstate(self, state: np.random.Generator) -> None:
        self.rng = state


NUMBERS = Numbers()
register_random(NUMBERS)  # pyright: ignore[reportArgumentType]
