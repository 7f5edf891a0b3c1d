"""A pack as a small program of its own: its op at its width, with the elementwise work that follows it.

A kernel that can runs that work in itself; for the others it is left to XLA, in the same program, so that both do the
same. What a program would read from memory, weights that no other kernel has touched, is what `Case.rhs` stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from coalesce import jaxpr as J
from coalesce.blocks import Blocks
from coalesce.bundle import Bundle, Pack, packs, problems
from coalesce.compile import fuse
from coalesce.epilogues import epilogue_reads
from coalesce.heavy import HeavyOp
from coalesce.kernels import choose, FUSING, indexed_gemm, KERNELS, mosaic_gemm, TAKES_APART
from coalesce.kernels.epilogue import Epilogue, WHOLE
from coalesce.lower_epilogue import epilogue_of
from coalesce.program import Program
from coalesce.tuning import Key, key_of, Tuned
from coalesce.tuning.candidates import Candidate, candidates


@dataclass(frozen=True)
class Case:
    """One thing to tune."""

    key: Key
    op: HeavyOp
    epilogue: Epilogue | None
    reads: tuple[jax.ShapeDtypeStruct, ...]  # what the epilogue reads, for all lanes
    steps: str  # the epilogue's primitives
    times: int  # how many packs of the programs are this one

    def candidates(self, platform: str, on_hopper: bool) -> list[Candidate]:
        apart = self.epilogue is not None and not self.epilogue.plain
        found = candidates(self.op, self.key.width, self.key.rows, platform, on_hopper)
        return [one for one in found if one[0] not in FUSING or one[0] in TAKES_APART or not apart]

    def usual(self, tuned: Tuned, platform: str) -> Candidate:
        """What runs it by what was tuned so far."""
        asked = self.op, self.key.width, self.key.rows
        kernel = tuned.kernel(*asked) or choose(self.op, self.key.width, platform)
        return kernel, tuned.blocks(*asked, kernel) if kernel in FUSING else None

    @property
    def lhs(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.key.width, self.key.rows, *self.op.lhs.shape), self.op.lhs.dtype)

    def rhs(self, kernel: str) -> jax.ShapeDtypeStruct:
        """The right operands as a kernel reads them."""
        row = KERNELS[kernel].layout(self.op).of(self.op.rhs.shape)
        return jax.ShapeDtypeStruct((self.key.width, *row), self.op.rhs.dtype)

    def run(self, kernel: str, blocks: Blocks | None) -> Callable[..., Any]:
        """(lhs, rhs, *reads) -> what the pack leaves: a value, or several."""

        def fusing(x: Any, w: Any, *given: Any) -> Any:
            how = {"epilogue": self.epilogue, "operands": given, "blocks": blocks}
            if kernel == "mosaic_gemm":  # in a program what wrote its operand rounds it, see round_results
                return mosaic_gemm.run(self.op, x, w, **how, rounded=True)
            return FUSING[kernel].run(self.op, x, w, **how)

        def plain(x: Any, w: Any, *given: Any) -> Any:
            y, work = KERNELS[kernel].run(self.op, x, w), self.epilogue
            if work is None:
                return y
            whole = [spread(self.op, z, kind, y.shape) for z, kind in zip(given, work.kinds, strict=True)]
            strips = [jnp.split(z, work.strips_of(i), axis=-1) for i, z in enumerate(whole)]
            left = [jnp.concatenate(own, -1) for own in work.results(jnp.split(y, work.parts, axis=-1), strips)]
            return left[0] if work.plain else left

        return fusing if kernel in FUSING else plain


def spread(op: HeavyOp, given: Any, kind: str, shape: Sequence[int]) -> Any:
    """An operand of an epilogue, over all rows of the result."""
    if kind == WHOLE:
        return given
    own = 1
    if op.kind == "dot":
        ((contracted, _), (batch, _)) = op.params["dimension_numbers"]
        own = len(op.rhs.shape) - len(batch) - len(contracted)
    start = len(shape) - own
    columns = shape[start:] if own != 1 else given.shape[-1:]
    return jnp.broadcast_to(given.reshape(*shape[:2], *[1] * (start - 2), *columns), (*shape[:start], *columns))


def wherever_it_can(op: HeavyOp, groups: int, platform: str) -> str:
    """A choice of kernels that shows what elementwise work follows each op."""
    return "indexed_gemm" if indexed_gemm.supports(op) else choose(op, groups, platform)


def plan_of(programs: Sequence[Program], platform: str | None = None) -> Bundle:
    """The fused programs as nothing was tuned, with what elementwise work follows each op."""
    return fuse(programs, choose_kernel=wherever_it_can, platform=platform, tuned=False).bundle


def cases(programs: Sequence[Program], device: str, platform: str | None = None) -> list[Case]:
    return cases_in(plan_of(programs, platform), device)


def cases_in(bundle: Bundle, device: str) -> list[Case]:
    """What the packs of a plan are, each once, in the order of the program. Of packs that differ in their elementwise
    work alone, the work that most of them have."""
    found: dict[Key, list[Pack]] = {}
    for pack in packs(bundle.schedule):
        if not pack.op.empty:
            width, rows = problems(pack, bundle.families)
            found.setdefault(key_of(pack.op, width, rows, device), []).append(pack)
    return [case(key, same) for key, same in found.items()]


def case(key: Key, same: Sequence[Pack]) -> Case:
    ((steps, _),) = Counter(steps_of(pack) for pack in same).most_common(1)
    pack = next(pack for pack in same if steps_of(pack) == steps)
    return Case(key, pack.op, *work_of(pack, key), steps, len(same))


def work_of(pack: Pack, key: Key) -> tuple[Epilogue | None, tuple[jax.ShapeDtypeStruct, ...]]:
    """A pack's epilogue, and what it reads for all lanes."""
    epilogue = epilogue_of(pack) if pack.epilogue else None
    reads: list[jax.ShapeDtypeStruct] = []
    for i, (atom, kind) in enumerate(zip(epilogue_reads(pack), epilogue.kinds if epilogue else (), strict=True)):
        columns = epilogue.strips_of(i) * pack.op.n // epilogue.parts if epilogue else 0
        whole = pack.op.out.shape if columns == pack.op.n else (*pack.op.out.shape[:-1], columns)
        own = whole if kind == WHOLE else (columns,)
        reads.append(jax.ShapeDtypeStruct((key.width, key.rows, *own), J.dtype(atom)))
    return epilogue, tuple(reads)


def steps_of(pack: Pack) -> str:
    return " ".join(step.eqn.primitive.name for step in pack.epilogue)
