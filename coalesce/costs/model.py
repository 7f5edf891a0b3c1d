"""The cost model: microseconds of an op, of a pack, and of the copies between packs, inside one compiled program.

Arithmetic on shapes alone, so that a search may ask thousands of times. A time is that of kernels in the middle of a
program; what a call costs besides is the same for every plan of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from coalesce.costs.devices import Device
from coalesce.costs.machine import Machine
from coalesce.costs.superkernels import BY_KERNEL, horizontal, im2col
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose
from coalesce.tuning import Tuned, UNTUNED

Key = tuple[Hashable, str, int, int]


class Costs:
    """Predictions for one device. Microseconds that were measured win over the model's: those in `measured`, by
    (op.key, kernel, groups, rows), and those of a tuning database, which are of kernels alone, without their launch."""

    def __init__(self, device: Device, measured: Mapping[Key, float] | None = None, tuned: Tuned = UNTUNED) -> None:
        self.device = device
        self.measured = dict(measured or {})
        self.tuned = tuned
        self.machine = Machine(device)

    @property
    def captured(self) -> Costs:
        """Of programs that are launched without JAX."""
        return Costs(self.device.captured, self.measured, self.tuned)

    def op(self, op: HeavyOp, groups: int, rows: int = 1, kernel: str | None = None) -> float:
        """One superkernel that runs `groups` problems of `op`, with `rows` lanes folded into each.

        `kernel` is a name of coalesce.kernels; what was tuned, or else `choose`, picks for the device, if not given.
        """
        kernel = kernel or self.tuned.kernel(op, groups, rows) or choose(op, groups, self.device.platform)
        if (known := self.known(op, groups, rows, kernel)) is not None:
            return known
        return self.launch if op.empty else BY_KERNEL[kernel](self.machine, op, groups, rows)

    def known(self, op: HeavyOp, groups: int, rows: int, kernel: str) -> float | None:
        """What was measured of it."""
        if self.measured and (us := self.measured.get((op.key, kernel, groups, rows))) is not None:
            return us
        alone = self.tuned.us(op, groups, rows, kernel)
        return None if alone is None else self.launch + alone

    def together(self, parts: Sequence[tuple[HeavyOp, int, int]]) -> float:
        """One launch of the horizontal kernel for (op, groups, rows) of any shapes."""
        return horizontal(self.machine, parts, [self.known(*part, "indexed_gemm") for part in parts])

    def patches(self, op: HeavyOp, groups: int, rows: int = 1) -> float:
        """The patches of a convolution, where they are not part of `op`'s kernel."""
        return im2col(self.machine, op, groups, rows)

    def stack(self, true_bytes: Sequence[int], padded_bytes: int) -> float:
        """Values of several members, padded and stacked to one array of `padded_bytes`: one kernel."""
        return self.machine.stream(0, sum(true_bytes) + padded_bytes)

    def light(self, bytes_read: int, bytes_written: int, kernels: int = 1) -> float:
        """Elementwise work, fused to `kernels` kernels."""
        return (kernels - 1) * self.launch + self.machine.stream(0, bytes_read + bytes_written)

    def move(self, nbytes: int) -> float:
        """So many bytes, read or written by kernels that are there anyway."""
        return self.machine.traffic(0, nbytes)

    @property
    def launch(self) -> float:
        """One more kernel in a program."""
        return self.device.launch_us

    @property
    def loop(self) -> float:
        """One more iteration of a loop, besides its body."""
        return self.device.loop_us

    @property
    def loop_wait(self) -> float:
        """How much longer, as a share, a step takes that waits for another loop's."""
        return self.device.loop_wait

    @property
    def margin(self) -> float:
        """What packing must win to be chosen, as a share of the time that it changes: less may be an error."""
        return self.device.margin

    @property
    def call(self) -> float:
        """One more call of a program, from the host."""
        return self.device.call_us
