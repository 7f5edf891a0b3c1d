"""The pairs of experiments/multiplexing.py: who the peers are, and how each of them meets Coalesce."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

from coalesce.models import by_name, Model
from experiments import floor, pairs, peers_jax, peers_processes, peers_torch, settings
from experiments.cells import brief, tenants_of
from experiments.pairs import Best, Limits, OURS
from experiments.peers_common import Cell, Peer
from experiments.results import Row

GROWS = "its compile time grows faster than the program"
CROWD = "so many processes and their contexts are no way to serve"
PEERS = {
    "jax_in_turn": Peer("time", peers_jax.in_turn),
    "torch_in_turn": Peer("time", peers_torch.in_turn),
    "processes": Peer("time", peers_processes.time_sliced, 16, CROWD),
    "torch_streams": Peer("space", peers_torch.streams),
    "processes_mps": Peer("space", peers_processes.under_mps, 16, CROWD),
    "xla_concurrent": Peer("space", peers_jax.concurrent, 16, GROWS),
    "jax_vmap": Peer("user", peers_jax.vmap),
    "torch_vmap": Peer("user", peers_torch.vmap),
    "torch_compile": Peer("user", peers_torch.compiled, 16, GROWS),
    "own_batch": Peer("floor", peers_jax.own_batch),
}
METHODS = (*PEERS, OURS, "floor")  # ours with no peer beside it


class Pair(NamedTuple):
    """A cell of the results."""

    model: str
    dtype: str
    tenants: int
    pair: str


class Bench:
    """Measures pairs, and keeps between those of the same tenants what all of them need. How it does so the flags of
    experiments/multiplexing.py say."""

    def __init__(self, fields: dict[str, dict[str, Any]]) -> None:
        self.fields = fields
        self.key: tuple[str, str, int] | None = None
        self.held: Held | None = None
        self.ceilings = cache(floor.measure_ceilings)

    def measure(self, pair: Pair) -> list[Row]:
        print(f"{pair.model}, {pair.dtype}, {pair.tenants} tenants: {pair.pair}", file=sys.stderr, flush=True)
        fields = self.fields.get(pair.model, {})
        model = by_name(pair.model, dtype=pair.dtype, param_dtype=pair.dtype, **fields)
        if pair.pair == "floor":
            rows = [floor.floor_row(model, pair.tenants, flags.FLAGS.batch, self.ceilings(pair.dtype))]
        else:
            rows = self.alternate(pair, model, fields)
        common = {"model": pair.model, "dtype": pair.dtype, "tenants": pair.tenants, "batch": flags.FLAGS.batch}
        pairs.free()
        return [{**common, "pair": pair.pair, **row} for row in rows]

    def alternate(self, pair: Pair, model: Model, fields: dict[str, Any]) -> list[Row]:
        limits = Limits(settings.tolerance(pair.dtype), flags.FLAGS.repeats, flags.FLAGS.seconds)
        peer = PEERS.get(pair.pair)
        kind = peer.kind if peer else OURS
        if peer and peer.most is not None and pair.tenants > peer.most:
            reason = f"left out above {peer.most} tenants: {peer.because}"
            return [{"method": pair.pair, "kind": kind, "failed": reason}]
        if self.held is None or self.key != pair[:3]:
            self.held = None  # the last tenants' weights, before there are new ones
            pairs.free()
            try:
                self.held, self.key = hold(pair, model, fields, limits), pair[:3]
            except (jax.errors.JaxRuntimeError, MemoryError) as e:
                return [{"method": pair.pair, "kind": kind, "failed": f"no reference: {brief(e)}"}]
        if peer is None:
            return pairs.measure_alone(self.held.ours, limits)
        return pairs.measure_pair(self.held.cell, pair.pair, peer, self.held.ours, self.held.want, limits)


class Held(NamedTuple):
    """Tenants, the outputs that everybody's are compared with, and Coalesce's best configuration."""

    cell: Cell
    want: list[np.ndarray]
    ours: Best


def hold(pair: Pair, model: Model, fields: dict[str, Any], limits: Limits) -> Held:
    print("  coalesced: building", file=sys.stderr, flush=True)
    tenants = tenants_of(model, pair.tenants, flags.FLAGS.batch)
    options = settings.options_to_try()
    given = model, fields, pair.dtype, flags.FLAGS.batch, flags.FLAGS.precision, tenants, options
    cell = Cell(*given, until_end=ExitStack(), autotune=flags.FLAGS.autotune)
    want = pairs.reference(cell)
    ours = partial(
        pairs.coalesced,
        within_program=flags.FLAGS.within_program,
        try_pallas=flags.FLAGS.pallas,
        called=flags.FLAGS.called,
    )
    return Held(cell, want, pairs.best_of(ours, cell, want, limits))
