"""Columns of a result as rows: what a warpgroup that has columns of a turned tile reads and writes.

A result lies in images beside one another, each a swizzled row wide: 64 columns of 16 bits, 32 of 32 bits. A warpgroup
has 64 columns, in registers as rows of all positions. Of 32 bits these are in two images, which no view of Pallas'
has as one; so what is read and written is said to Mosaic itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.experimental import pallas as pl

from coalesce.kernels.mosaic import backend, GROUP, Images, TOGETHER


@dataclass(frozen=True)
class Beside(Images):
    """[parts, tall, wide, ROW_BYTES / itemsize] in shared memory."""

    def views(self) -> tuple[Any, ...]:
        """As TMA writes it, and its bytes in tiles of 8 rows."""
        first, *_ = super().views()
        if self.interpreted:
            return (first,)
        tiles = self.tall * self.wide // TOGETHER
        return first, backend().SMEM((*self.before, tiles, TOGETHER, self.row), self.dtype)

    def load(self, ref: Any, column: Any) -> Any:
        """[GROUP, positions] from a column on, which is a multiple of GROUP."""
        at, shape = self.part(ref, column), (GROUP, self.tall * self.wide)
        if self.interpreted:
            return at[...].transpose(0, 2, 1).reshape(shape)
        plgpu = backend()
        out = plgpu.ShapeDtypeStruct(shape, self.dtype, layout=plgpu.Layout.WGMMA)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=out)
        def loaded(_: Any, ref: Any) -> Any:
            from jax.experimental.mosaic import gpu as mgpu

            held = mgpu.FragmentedArray.load_tiled(turned(ref), swizzle=128, layout=self.held())
            return held.to_layout(mgpu.WGMMA_LAYOUT)

        return loaded(at)

    def store(self, ref: Any, column: Any, value: Any) -> None:
        at = self.part(ref, column)
        if self.interpreted:
            at[...] = value.reshape(-1, self.row, self.tall * self.wide).transpose(0, 2, 1)
            return
        plgpu = backend()

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
        def stored(_: Any, ref: Any, value: Any) -> None:
            value.to_layout(self.held()).store_tiled(turned(ref), swizzle=128)

        stored(at, value)

    def part(self, ref: Any, column: Any) -> Any:
        return ref[-1].at[pl.ds(column // self.row, GROUP // self.row)]

    def held(self) -> Any:
        """The layout of registers of which each goes to memory as one: of two columns that are neighbours there, of 32
        bits of one. No two threads of a warp then write to one bank."""
        from jax.experimental.mosaic.gpu import fragmented_array as held

        return held.WGMMA_TRANSPOSED_LAYOUT if self.dtype.itemsize == 2 else held.WGMMA_LAYOUT_ACC_32BIT


def turned(tiles: Any) -> Any:
    """Tiles of rows of positions, as tiles of columns."""
    from jax.experimental.mosaic import gpu as mgpu

    return mgpu.memref_transpose(tiles, (0, 1, 3, 2))
