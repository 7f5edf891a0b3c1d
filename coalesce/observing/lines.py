"""A file that is written some lines at a time, so that it is known how many a full disk has not taken."""

from __future__ import annotations

from pathlib import Path

from coalesce.observing.aside import Lost

TOGETHER = 64


class Lines:
    """`first` is what the file begins with; it is none of the lines."""

    def __init__(self, path: str | Path, first: str = "") -> None:
        self._file = Path(path).open("wb", buffering=0)
        self._text = [first]
        self._count = 0  # of lines that are not written yet

    def add(self, line: str) -> None:
        """Raises Lost for the lines that the disk did not take, if it should have taken some."""
        self._text.append(line)
        self._count += 1
        if self._count >= TOGETHER:
            self._write()

    def _write(self) -> None:
        left, count = memoryview("".join(self._text).encode()), self._count
        self._text, self._count = [], 0
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as e:
            raise Lost(count) from e

    def close(self) -> None:
        try:
            self._write()
        finally:
            self._file.close()
