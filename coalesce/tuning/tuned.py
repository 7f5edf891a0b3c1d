"""A database as the compiler asks it: what was measured for an op on one kind of device.

An op at a width that was not tuned gets what won at the nearest width that was, if that is at most WITHIN times as wide
or as narrow: the work of one problem is the same, and only how many tiles there are differs. Of several problems one
alone is asked last, and only if a kernel of ours won: XLA's that win it may run several one after another. Where there
is none, what won for FULL problems or more is taken for any number above, which mostly wins over what is known without:
64 VGG-16 in float32 took 323 us each on an H200 and take 232, 64 ViT-B/16 in bfloat16 take 3% longer. Where nothing
like it was measured, a model of the tiles names blocks (see estimate.py). Times are of the very width that was
measured, or none; of two kernels the nearest width at which both were measured says which is quicker.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from itertools import product
from pathlib import Path

from coalesce.blocks import Blocks
from coalesce.errors import TuningError
from coalesce.heavy import HeavyOp
from coalesce.kernels import FUSING, KERNELS, VERSION
from coalesce.tuning.chains import APART, Chain, CHAINED, has_whole_tiles
from coalesce.tuning.database import Database, known, load
from coalesce.tuning.entry import Entry, op_text
from coalesce.tuning.estimate import best_blocks, KERNEL

LOG = logging.getLogger("coalesce.tuning")

WITHIN = 4
FULL = 8
GROWING = frozenset({"separate", "conv_slices"})  # whose launches, or memory, become too many

# Of what a chain replaces: among 16 ResNet-50 one that won 10% by itself was level, and one that won 14% won.
LEAST_GAIN = 0.125

# The same chip with another memory: what is fastest is the same, times are not.
KIN = {"NVIDIA H100 80GB HBM3": "NVIDIA H200", "NVIDIA H200": "NVIDIA H100 80GB HBM3"}

Widths = dict[tuple[str, int], dict[int, Entry]]  # (op, rows) -> width -> entry


class Tuned:
    """The entries for one kind of device and this version of the kernels; where there are none, those of its kin."""

    def __init__(self, database: Database, device: str) -> None:
        self.own = widths(database, device)
        self.kin = widths(database, KIN.get(device, ""))
        self.device = device
        # A search asks for the same ops many times: op_text by op.key, and likely blocks by that, width and rows.
        self.texts: dict[Hashable, str] = {}
        self.likely: dict[Hashable, Blocks | None] = {}

    def kernel(self, op: HeavyOp, width: int, rows: int) -> str | None:
        """The kernel that was fastest, or that should be where nothing was measured."""
        if self.nearest(op, width, rows) is None:
            return KERNEL if self.estimated(op, width, rows) else None
        return self.fastest(op, width, rows)

    def fastest(self, op: HeavyOp, width: int, rows: int) -> str | None:
        """The kernel that was, as far as anything was measured."""
        entry = self.nearest(op, width, rows)
        return entry.kernel if entry and entry.kernel in KERNELS and KERNELS[entry.kernel].supports(op) else None

    def blocks(self, op: HeavyOp, width: int, rows: int, kernel: str) -> Blocks | None:
        """The blocks that were, or should be, fastest for a kernel, whether or not it was the fastest itself."""
        entry = self.nearest(op, width, rows, kernels=(kernel,))
        best = entry.best(kernel) if entry else None
        if best is None:
            return self.estimated(op, width, rows) if kernel == KERNEL else None
        return best[0]

    def estimated(self, op: HeavyOp, width: int, rows: int) -> Blocks | None:
        key = op.key, width, rows
        if key not in self.likely:
            self.likely[key] = best_blocks(op, width, rows, self.device)
        return self.likely[key]

    def us(self, op: HeavyOp, width: int, rows: int, kernel: str) -> float | None:
        entry = self.of(op, rows, self.own).get(width)
        best = entry.best(kernel) if entry else None
        return best[1] if best else None

    def rivals(self, op: HeavyOp, width: int, rows: int, kernels: tuple[str, str]) -> tuple[float, float] | None:
        """Microseconds of two kernels, as far as the nearest width says at which both were measured: each problem takes
        its part of that."""
        found = self.near(op, width, rows, kernels=kernels)
        if found is None:
            return None
        first, second = (best for kernel in kernels if (best := found[1].best(kernel)))
        return first[1] * width / found[0], second[1] * width / found[0]

    def chain(self, chain: Chain, width: int, rows: int) -> tuple[Blocks, float] | None:
        """The blocks of products that run as one, and the microseconds that it wins; None if it wins too little, or
        nothing like it was measured. At a smaller width it has fewer programs than what it replaces, and may lose."""
        entry = self.nearest(chain, width, rows, least=1.0)
        blocks = entry.blocks if entry and entry.kernel == CHAINED else None
        apart = entry.best(APART) if entry else None
        if entry is None or blocks is None or apart is None or entry.us > (1 - LEAST_GAIN) * apart[1]:
            return None
        if not has_whole_tiles(chain, blocks):
            LOG.warning("tuned blocks %s that do not divide %d columns are left out: %s", blocks, chain.wide.n, chain)
            return None
        return blocks, apart[1] - entry.us

    def nearest(
        self, op: HeavyOp | Chain, width: int, rows: int, least: float = 1 / WITHIN, kernels: Sequence[str] = ()
    ) -> Entry | None:
        """At a width that is at least so many times that of the measurement, of which these kernels were a part."""
        found = self.near(op, width, rows, least, kernels)
        return found[1] if found else None

    def near(
        self, op: HeavyOp | Chain, width: int, rows: int, least: float = 1 / WITHIN, kernels: Sequence[str] = ()
    ) -> tuple[int, Entry] | None:
        """The nearest entry, with its width."""

        def is_near(w: int) -> bool:
            return w * least <= width <= WITHIN * w

        def within(w: int, entry: Entry) -> bool:
            return is_near(w) and (w > 1 or width == 1)

        def alone(w: int, entry: Entry) -> bool:
            return is_near(w) and w == 1 and entry.kernel in FUSING

        def above_full(w: int, entry: Entry) -> bool:
            return isinstance(op, HeavyOp) and FULL <= w <= width and entry.kernel not in GROWING

        for rule, entries in product((within, alone, above_full), (self.own, self.kin)):
            found = self.of(op, rows, entries)
            near = [w for w, entry in found.items() if rule(w, entry) and all(map(entry.best, kernels))]
            if near:
                at = min(near, key=lambda w: (max(w, width) / min(w, width), w))
                return at, found[at]
        return None

    def of(self, op: HeavyOp | Chain, rows: int, entries: Widths) -> dict[int, Entry]:
        """Entries by width."""
        if not entries:
            return {}
        text = self.texts.get(op.key)
        if text is None:
            text = self.texts[op.key] = op_text(op) if isinstance(op, HeavyOp) else str(op)
        return entries.get((text, rows), {})


def widths(database: Database, device: str) -> Widths:
    found: Widths = {}
    for key, entry in database.entries.items():
        if (key.device, key.version) == (device, VERSION):
            found.setdefault((key.op, key.rows), {})[key.width] = entry
    return found


UNTUNED = Tuned(Database(), "")


def tuned_on(device: str, given: Database | str | Path | bool | None = None) -> Tuned:
    """None or True: what Coalesce brings along, under the user's own entries; False: nothing; or a database, or its
    file, and nothing else."""
    if given is False:
        return UNTUNED
    if isinstance(given, Database):
        return Tuned(given, device)
    if isinstance(given, str | Path):
        return Tuned(load(Path(given)), device)
    if given not in (None, True):
        raise TuningError(f"tuned is {given!r}; expected None, False, a Database or the path of one")
    return Tuned(known(), device)
