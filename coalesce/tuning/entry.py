"""One measurement: what was measured, what won, and what else was tried."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from coalesce import jaxpr as J
from coalesce.blocks import Blocks
from coalesce.heavy import HeavyOp
from coalesce.kernels import VERSION
from coalesce.text import shown_params


@dataclass(frozen=True, order=True)
class Key:
    device: str  # as JAX names the kind
    version: int  # of coalesce.kernels
    op: str  # op_text, dtypes included
    width: int  # problems with right operands of their own
    rows: int  # lanes on each


@dataclass(frozen=True)
class Entry:
    """Times are microseconds of kernels on a GPU, of the device otherwise; None: it did not compile or run.

    A candidate is called by its kernel, and its blocks if it has some: "conv_slices", "indexed_gemm 64x64x32 w4 s3".
    The kernel "separate" says that the problems are better run one by one than fused.
    """

    kernel: str
    us: float
    blocks: Blocks | None = None
    tried: Mapping[str, float | None] = field(default_factory=dict)  # every candidate, the winner too
    epilogue: str = ""  # the elementwise work that was measured with it: names of primitives
    jax: str = ""  # the version of JAX
    company: Mapping[str, float | None] = field(default_factory=dict)  # of some of those tried, beside another launch

    def best(self, kernel: str) -> tuple[Blocks | None, float] | None:
        """(blocks, microseconds) of the fastest candidate of a kernel."""
        times = {candidate_name(self.kernel, self.blocks): self.us, **self.tried}
        found = [(us, *named(name)) for name, us in times.items() if us is not None]
        own = [(us, blocks) for us, name, blocks in found if name == kernel]
        if not own:
            return None
        us, blocks = min(own, key=lambda one: (one[0], str(one[1])))
        return blocks, us


def key_of(op: HeavyOp, width: int, rows: int, device: str) -> Key:
    return Key(device, VERSION, op_text(op), width, rows)


def op_text(op: HeavyOp) -> str:
    """What decides the work of an op, in our own text form, which is the same under all versions of JAX."""
    params = " ".join(shown_params(op.params))
    return f"{op.kind} {J.short(op.lhs)} x {J.short(op.rhs)} -> {J.short(op.out)} [{params}]"


def candidate_name(kernel: str, blocks: Blocks | None) -> str:
    return f"{kernel} {blocks}" if blocks else kernel


def named(candidate: str) -> tuple[str, Blocks | None]:
    """The (kernel, blocks) that a candidate's name says."""
    kernel, _, blocks = candidate.partition(" ")
    return kernel, blocks_of(blocks) if blocks else None


def blocks_of(text: str) -> Blocks:
    """Raises ValueError if `text` is not what `str` of Blocks gives."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+) w(\d+) s(\d+)( turned)?( over)?", text)
    if not found:
        raise ValueError(f"{text!r} are no blocks; expected such as 64x64x32 w4 s3")
    *numbers, turned, over = found.groups()
    m, n, k, warps, stages = sizes = tuple(map(int, numbers))
    powers = [k, *([] if n in (96, 192) else [n]), *([] if turned else [m])]
    if any(size & (size - 1) for size in powers) or min(sizes) < 1 or (turned and m % 8):
        why = "sizes are powers of two (n may be 96 or 192, m a multiple of 8 if turned), warps and stages 1 at least"
        raise ValueError(f"{text!r} are no blocks: {why}")
    return Blocks(m, n, k, warps, stages, turned is not None, over is not None)
