"""Pallas' Mosaic GPU backend, as far as the kernels use it: the one place that knows its versions. For a Hopper GPU.

What a kernel computes with lies in shared memory in swizzled rows of ROW_BYTES. TMA writes images there row by row, and
wgmma reads tiles of 8 rows; with rows of that width the bytes are the same, so that one memory has both views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import ClosedJaxpr

from coalesce import jaxpr as J
from coalesce.kernels.underived import underived

ROW_BYTES = 128
SHARED_BYTES = 227 * 1024  # of a program on an H100
GROUP = 64  # rows that a warpgroup multiplies at once
TOGETHER = 8  # rows of a tile
HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200")
# What the backend lowers on a tile, in all versions that are supported.
LOWERED = frozenset(
    """abs add and bitcast_convert_type broadcast_in_dim convert_element_type div eq exp exp2 ge gt jit le log logistic
    lt max min mul ne neg not or pjit reduce_max reduce_min reduce_sum rsqrt select_n sign square sub tanh""".split()
)

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Images:
    """[*before, tall, wide, ROW_BYTES / itemsize] in shared memory; `wide` is a multiple of 8.

    Interpreted it is one array, and what copies it copies one row of an image at a time.
    """

    before: tuple[int, ...]
    tall: int
    wide: int
    dtype: Any
    interpreted: bool

    @property
    def row(self) -> int:
        return ROW_BYTES // self.dtype.itemsize

    def views(self) -> tuple[Any, ...]:
        """Of one memory: as TMA writes it, and as wgmma reads it."""
        plgpu = backend()
        swizzle = plgpu.SwizzleTransform(ROW_BYTES)
        tiles = (plgpu.TilingTransform((TOGETHER, self.row)), swizzle)
        rows = plgpu.SMEM((*self.before, self.tall * self.wide, self.row), self.dtype, transforms=tiles)
        if self.interpreted:
            return (rows,)
        lie = plgpu.SMEM((*self.before, self.tall, self.wide, self.row), self.dtype, transforms=(swizzle,))
        return lie, rows

    def rows(self, ref: Any, place: tuple[Any, ...], first: Any, count: int) -> Any:
        """Rows as wgmma takes them: position i of an image row h is row h * wide + i."""
        return ref[-1].at[*place, pl.ds(first, count)]

    def copies(
        self, ref: Any, place: tuple[Any, ...], count: int, begin: Any = 0
    ) -> list[tuple[Callable[[Any], Any], Any]]:
        """(from a first row of an image the index of what is copied, where it lies) of each copy of `count` rows, which
        lie from the row `begin` on."""
        if not self.interpreted:
            return [(lambda first: pl.ds(first, count), ref[0].at[*place, pl.ds(begin, count)])]
        return [
            (lambda first, i=i: first + i, ref[0].at[*place, pl.ds((begin + i) * self.wide, self.wide)])
            for i in range(count)
        ]

    def count(self, rows: int) -> int:
        """How many copies that is."""
        return rows if self.interpreted else 1


@dataclass(frozen=True)
class Rows:
    """[stages, k, n] of right operands in shared memory, from [K, N]: for 16 bits, which are multiplied either way.

    It is written in tiles of 8 rows: a row of the array that is a multiple of 8 is where a copy may begin.
    """

    stages: int
    k: int
    n: int
    dtype: Any
    interpreted: bool

    @property
    def row(self) -> int:
        return ROW_BYTES // self.dtype.itemsize

    def views(self) -> tuple[Any, ...]:
        plgpu = backend()
        tiles = (plgpu.TilingTransform((TOGETHER, self.row)), plgpu.SwizzleTransform(ROW_BYTES))
        return (plgpu.SMEM((self.stages, self.k, self.n), self.dtype, transforms=tiles),)

    def copies(self, ref: Any, stage: Any, row: Any, start: Any, k: Any, n: Any) -> list[tuple[Index, Any]]:
        """(what is copied from [rows, .., N], where K begins at `start`, where it lies) of each copy."""
        return [((row, pl.ds(start + k, self.k), pl.ds(n, self.n)), ref[0].at[stage])]

    @property
    def count(self) -> int:
        """How many copies that is."""
        return 1

    def part(self, ref: Any, stage: Any, d: int) -> Any:
        """The d-th row's width of K, [row, n], as wgmma takes it."""
        return ref[0].at[stage, pl.ds(d * self.row, self.row)]

    def turned(self, ref: Any, stage: Any, d: int, first: Any, count: int) -> Any:
        """Of that some columns, [count, row]."""
        return ref[0].at[stage, pl.ds(d * self.row, self.row), pl.ds(first, count)].transpose((1, 0))


@dataclass(frozen=True)
class Columns:
    """The same from [N, K]: what wgmma demands of 32 bits. A copy may begin anywhere."""

    stages: int
    k: int
    n: int
    dtype: Any
    interpreted: bool

    @property
    def images(self) -> Images:
        return Images((self.stages, self.count), 1, self.n, self.dtype, self.interpreted)

    def views(self) -> tuple[Any, ...]:
        return self.images.views()

    def copies(self, ref: Any, stage: Any, row: Any, start: Any, k: Any, n: Any) -> list[tuple[Index, Any]]:
        """(what is copied from [rows, .., K], where N begins at `start`, where it lies) of each copy."""
        wide = self.k // self.count
        each = [(d, one) for d in range(self.count) for one in self.images.copies(ref, (stage, d), 1)]
        return [((at(row), pl.ds(start + n, self.n), pl.ds(k + d * wide, wide)), to) for d, (at, to) in each]

    @property
    def count(self) -> int:
        return self.k * self.dtype.itemsize // ROW_BYTES

    def part(self, ref: Any, stage: Any, d: int) -> Any:
        return self.images.rows(ref, (stage, d), 0, self.n).transpose((1, 0))

    def turned(self, ref: Any, stage: Any, d: int, first: Any, count: int) -> Any:
        return self.images.rows(ref, (stage, d), first, count)


def backend() -> Any:
    from jax.experimental.pallas import mosaic_gpu  # here: a process that never meets a GPU kernel does not pay for it

    return mosaic_gpu


def is_hopper(kind: str) -> bool:
    """Of a device's kind, as JAX names it."""
    return kind.startswith(HOPPER)


def on_hopper(device: Any) -> bool:
    """Whether it is a GPU with what the kernels use: there are older and newer ones without."""
    return str(getattr(device, "compute_capability", "")) == "9.0"


def lowers(jaxpr: ClosedJaxpr) -> bool:
    """Whether the backend has all that is computed of tiles."""
    return not jaxpr.consts and {eqn.primitive.name for eqn in J.walk(jaxpr)} <= LOWERED


def joins() -> bool:
    """Whether the backend lays tiles side by side: that of JAX 0.10 does not."""
    return jax.__version_info__ >= (0, 11)


def load(ref: Any, layout: Any) -> Any:
    plgpu = backend()
    if jax.__version_info__ < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def iota(shape: Sequence[int], dimension: int) -> Any:
    """As wgmma leaves a result."""
    plgpu = backend()
    return plgpu.broadcasted_iota(jnp.int32, tuple(shape), dimension, layout=plgpu.Layout.WGMMA)


def multiply(acc: Any, left: Any, right: Any, through: Any) -> None:
    """Add left x right, where the former is in registers; interpreted it goes `through` shared memory."""
    plgpu = backend()
    if through is None:
        plgpu.wgmma(acc, left, right)
        return
    through[...] = left
    plgpu.wgmma(acc, through, right)
    plgpu.wgmma_wait(0)


def relaid(x: Any, layout: Any) -> Any:
    """The same elements, held by other threads."""
    return backend().layout_cast(x, layout)


def memory(views: Sequence[Any]) -> Any:
    """One, whose views are indexed as `views`."""
    return views if len(views) == 1 else backend().RefUnion(*views)


def memory_over(first: Sequence[Sequence[Any]], after: Sequence[Any]) -> Any:
    """One, in which several lie side by side, and after them another; see `parted`."""
    return backend().RefUnion([views[0] for views in first], [views[-1] for views in first], *after)


def parted(ref: Any) -> tuple[list[Any], Any]:
    """The several and the other one of `memory_over`, each as `memory` has it."""
    first, last, *after = ref
    return list(zip(first, last, strict=True)), after


def wait_if(needed: Any, barriers: Any, at: Any) -> None:
    @pl.when(needed)
    def _() -> None:
        backend().barrier_wait(barriers.at[at])


def wait_for_others() -> None:
    """Until what was launched before has ended, and what it wrote can be read. CUDA may then launch the kernel before
    that: 0.6 to 2.4% of a network. XLA has its kernels wait so, and those of Triton; Mosaic can since JAX 0.11.

    To say early that the next one may be launched loses more than it wins (docs/performance.md, "What did not help").
    """
    if jax.__version_info__ >= (0, 11):
        backend().griddepcontrol_wait()


def call(
    kernel: Callable[..., None],
    grid: Mapping[str, int],
    groups: int,
    out: jax.ShapeDtypeStruct,
    args: Sequence[Any],
    scratch: Mapping[str, Any],
    *,
    name: str,
    interpreted: bool,
) -> Any:
    """One launch of `kernel(*args, out, **scratch)` by `groups` warpgroups, whose number is the axis "group"."""
    plgpu = backend()
    how: dict[str, Any] = {"interpret": plgpu.InterpretGPUParams()} if interpreted else {}

    def begun(*refs: Any, **memory: Any) -> None:
        if not interpreted:
            wait_for_others()
        kernel(*refs, **memory)

    run = plgpu.kernel(
        begun,
        out_type=out,
        scratch_types=dict(scratch),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=groups,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # a warpgroup writes what only its own threads have read
        ),
        **how,
    )
    return underived(run, name)(*args)
