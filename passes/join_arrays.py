"""Lay weights side by side in a few large arrays, since every argument of a call costs time: about a microsecond on a
GPU's host.

Before                                          After
    array 0: 16 rows of bf16[576,64], ...           array 0: 16 rows of bf16[576,64], ...
    array 1: 16 rows of bf16[64,256], ...           array 1: 16 rows of bf16[64,256], ...
                                                    slab of 16 rows of bf16[53248]: array 0 at 0, array 1 at 36864

Arrays of one dtype whose rows belong to the same tenants make a slab, if each of their readers can read them where they
lie: kernels that take cuts of slabs, and for a small row whatever XLA fuses its slice with. Relies on: all arrays are
planned. A program for a CPU keeps its arguments, which cost little there, unless such a kernel was asked for.

XLA fuses a slice with what reads it where it predicts that to be quicker than a kernel for the slice: where little is
read of it all in all, or where the slab is small. So what XLA reads lies in slabs of its own, the smaller the more is
read. (Of 8 ViT-B/16 in float32 108 of 295 kernels were slices, each of a vector.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import lcm, prod

import numpy as np

from coalesce import jaxpr as J
from coalesce.bundle import Array, Bundle, equations, items, JointStep, Pack, packs
from coalesce.kernels import FUSING, mosaic_gemm
from coalesce.slab import Slab

SMALL_ROW = 64 * 1024  # bytes that may be read through a slice
ALIGNED = 128  # bytes: what a load of a GPU's memory takes at once
COARSEST = 64 * 1024  # elements that an array's start may be rounded to
LONGEST_ROW = 2**31 - 1  # elements: places within a row are 32 bits wide
LARGEST = 2**32  # bytes of a slab: beyond, kernels would address all of it with 64 bits
# (bytes that are read of a slice, by everything that it is broadcast to; bytes of its slab at most): beyond, slices are
# kernels of their own. Found by compiling networks for an H100.
SLICED = ((2**21, LARGEST), (5 * 2**20, 2**21), (2**63, 2**18))


def join_arrays(bundle: Bundle, platform: str) -> Bundle:
    if platform == "cpu" and not any(takes_cuts(pack) for pack in packs(bundle.schedule)):
        return bundle
    groups: dict[tuple[tuple[int, ...], str, int], list[int]] = {}
    fixed, most = set(read_whole(bundle)), largest_slabs(bundle)
    for i, array in enumerate(bundle.arrays):
        if i not in fixed:
            key = tuple(tenant for tenant, _ in array.rows), array.dtype, most.get(i, LARGEST)
            groups.setdefault(key, []).append(i)
    slabs = tuple(
        slab
        for (_, _, nbytes), group in groups.items()
        for slab in side_by_side(bundle.arrays, group, longest(bundle.arrays[group[0]], nbytes))
        if len(slab.arrays) > 1
    )
    return bundle if slabs == bundle.slabs else replace(bundle, slabs=slabs)


def takes_cuts(pack: Pack) -> bool:
    return pack.kernel in FUSING and not pack.form and pack.op.batch == 1


def read_whole(bundle: Bundle) -> Iterator[int]:
    """Arrays that have a reader which would have to copy them out of a slab."""
    for item in items(bundle.schedule):
        if isinstance(item, Pack) and item.array is not None and not takes_cuts(item):
            yield item.array
        elif isinstance(item, JointStep):
            yield from (array for array in item.arrays if array is not None)
    for i in bundle.stored.values():
        if row_bytes(bundle.arrays[i]) > SMALL_ROW:
            yield i


def largest_slabs(bundle: Bundle) -> dict[int, int]:
    """Of arrays that equations outside of such kernels read, the bytes that a slab may have for XLA to slice it."""
    stored = {(f, bundle.families[f].weights[w]): i for (f, w), i in bundle.stored.items()}
    read: dict[int, int] = {}
    for item in items(bundle.schedule):
        for f, eqn in [] if isinstance(item, Pack) and takes_cuts(item) else equations(item):
            elements = bundle.families[f].width * max((prod(J.shape(v)) for v in eqn.outvars), default=0)
            for i in {stored[f, a] for a in eqn.invars if not isinstance(a, J.Literal) and (f, a) in stored}:
                read[i] = max(read.get(i, 0), elements * np.dtype(bundle.arrays[i].dtype).itemsize)
    return {i: next(most for much, most in SLICED if nbytes <= much) for i, nbytes in read.items()}


def row_bytes(array: Array) -> int:
    return prod(array.shape) * np.dtype(array.dtype).itemsize


def longest(array: Array, nbytes: int) -> int:
    """How many elements a row of a slab of so many bytes may have, for arrays with so many rows."""
    return min(LONGEST_ROW, nbytes // (len(array.rows) * np.dtype(array.dtype).itemsize))


def side_by_side(arrays: Sequence[Array], group: Sequence[int], longest: int) -> Iterator[Slab]:
    """Slabs of arrays of one dtype, each no longer than can be addressed; of one array where there is room for one.

    What TMA may read starts at a multiple of its granule, and its slab ends at one. Arrays whose granule has too little
    in common with those of the others are a slab of their own.
    """
    step = max(1, ALIGNED // np.dtype(arrays[group[0]].dtype).itemsize)
    granules = {i: lcm(step, mosaic_gemm.granule(arrays[i].shape, arrays[i].dtype)) for i in group}
    for whole, members in by_granule(granules, step):
        inside: list[int] = []
        starts: list[int] = []
        size = 0
        for i in members:
            start, length = up(size, granules[i]), prod(arrays[i].shape)
            if inside and up(start + length, whole) > longest:
                yield Slab(tuple(inside), tuple(starts), up(size, whole))
                inside, starts, start = [], [], 0
            inside.append(i)
            starts.append(start)
            size = start + length
        yield Slab(tuple(inside), tuple(starts), up(size, whole))


def by_granule(granules: Mapping[int, int], step: int) -> Iterator[tuple[int, list[int]]]:
    """(a multiple of their granules, arrays) for each slab: no larger than COARSEST, unless it is one granule."""
    found: list[int] = [step]
    for granule in sorted(set(granules.values()) - {step}):
        at = next((at for at, whole in enumerate(found) if lcm(whole, granule) <= COARSEST), len(found))
        found[at : at + 1] = [lcm(granule, *found[at : at + 1])]
    of = {granule: next(whole for whole in found if whole % granule == 0) for granule in granules.values()}
    for whole in found:
        if members := [i for i, granule in granules.items() if of[granule] == whole]:
            yield whole, members


def up(size: int, step: int) -> int:
    return -(-size // step) * step
