"""Many rows into one place by one call, which gives the interpreter's lock away once, or, of small ones, not at all.

NumPy gives the lock away for each array of some size that it copies, and has to get it back, for which it waits until
another thread gives it away: of eight requests of 300 kB each, the driver of a busy runtime waited twice as long as it
copied. Linux has a call that copies any number of pieces of a process's memory, also of the caller's own. It takes up
to 1.4 times as long as NumPy on the hosts of an H200; of 8,000 requests a second for 16 ResNet-50 98.8% were in time
with it, and on another such host 87.5% without. A function in C that copies row by row was level with it (96% to 99%).

Small rows Python joins as bytes, with the lock: sixteen of 4 kB take 2 us, and 4 us one by one, in each of which NumPy
gives the lock away, since they have more than 500 elements, and whoever waits for it wakes up in vain.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

SEVERAL, SMALL = 4, 256 * 2**10  # rows that are joined: so many, and bytes of all of them, which are copied twice
LARGE = 32 * 2**10  # bytes of a row: the call looks at every page of it, and NumPy copies less sooner
MOST = 1024  # pieces in one call
ROWS, BYTES, TIMES = 8, 300 * 2**10, 3  # of a trial
SLOWER = 2  # times that this may be than NumPy: to wait for the lock takes longer


def gather(rows: Sequence[np.ndarray], place: np.ndarray) -> bool:
    """Whether the rows lie in `place` now, one after another; else nothing is known of it, and whoever asked copies
    them. A single row and small ones are left to NumPy, and so is what does not lie in one piece."""
    each = place.nbytes // len(place)
    if each < LARGE or not 1 < len(rows) <= MOST or not all([row.flags.c_contiguous for row in rows]):
        return False
    read = reader()
    if read is None:
        return False
    pieces = [number for row in rows for number in (row.ctypes.data, each)]
    to = struct.pack("2N", place.ctypes.data, place.nbytes)
    return read(os.getpid(), to, 1, struct.pack(f"{len(pieces)}N", *pieces), len(rows), 0) == place.nbytes


def join(rows: Sequence[Any], place: np.ndarray) -> bool:
    """Whether the rows, arrays of its dtype, lie at the beginning of `place` now; else nothing was done. Not a few, nor
    large ones, nor any that are in several pieces."""
    size = place.nbytes // len(place) * len(rows)
    if len(rows) < SEVERAL or not 0 < size <= SMALL:
        return False
    try:
        content = b"".join(rows)
    except TypeError:  # in several pieces
        return False
    place.reshape(-1).view(np.uint8).data[:size] = content
    return True


@cache
def reader() -> Callable[..., int] | None:
    try:
        read = ctypes.CDLL(None).process_vm_readv
    except (AttributeError, OSError, TypeError):  # not Linux
        return None
    vector = ctypes.c_char_p, ctypes.c_ulong  # addresses and lengths, and how many
    read.argtypes, read.restype = [ctypes.c_int, *vector, *vector, ctypes.c_ulong], ctypes.c_ssize_t
    return read


@cache
def is_worth_it() -> bool:
    """Where it is allowed, and not much slower than NumPy, as on some virtual machines; takes a few milliseconds."""
    rows, place = [np.ones(BYTES, np.uint8) for _ in range(ROWS)], np.zeros((ROWS, BYTES), np.uint8)
    if not gather(rows, place) or not place.all():
        return False

    def copy() -> None:
        for i, row in enumerate(rows):
            place[i] = row

    return least_s(lambda: gather(rows, place)) < SLOWER * least_s(copy)


def least_s(do: Callable[[], object]) -> float:
    taken = []
    for _ in range(TIMES):
        begun_s = time.perf_counter()
        do()
        taken.append(time.perf_counter() - begun_s)
    return min(taken)
