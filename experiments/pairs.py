"""A peer and Coalesce as a pair: each in its own best configuration, compared with the reference and timed in turns.

A configuration is chosen in a short run of its own; the pair is two contenders only, so that each peer alternates with
Coalesce alone.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments import methods
from experiments.cells import brief, largest_error, on_host
from experiments.measure import each_round, interleave, issued, Timing
from experiments.methods import Candidate, Options
from experiments.peers_common import Burst, CannotRun, Cell, Configurations, Peer, with_options
from experiments.results import Row

OURS = "coalesced"  # a method, of a kind of its own
CHOOSING = 20  # most repeats of a configuration while the best one is looked for
IN_A_ROW = 10  # rounds under way at once, at most


@dataclass(frozen=True)
class Limits:
    tolerance: float
    repeats: int
    seconds: float  # of a pair's timing, and at most as many to choose the configurations


@dataclass(frozen=True)
class Best:
    """A method's fastest configuration; `burst` is None if none ran."""

    burst: Burst | None
    error: float  # of its outputs, relative to the reference
    tried: tuple[Row, ...]

    @property
    def failed(self) -> str:
        reasons = dict.fromkeys(row["failed"] for row in self.tried if "failed" in row)
        return "" if self.burst else "; ".join(reasons) or "nothing to try"


def reference(cell: Cell) -> list[np.ndarray]:
    """Each tenant's outputs, by its own executable under JAX."""
    return on_host(next(methods.sequential(cell.tenants, cell.options[-1])))


def coalesced(
    cell: Cell, within_program: bool = False, try_pallas: bool = True, called: bool = False
) -> Configurations:
    """coalesce.fuse by its public calls, with a tenant's own inputs and outputs or with stacks of them, as peers leave
    theirs in stacks. On a GPU captured, as they leave them in buffers of a CUDA graph, and as JAX calls it only if it
    is to be `called` too, which was slower for every model; there with Pallas kernels too, wherever they run."""
    pallas = {"Pallas kernels": methods.by_pallas} if try_pallas and jax.default_backend() == "gpu" else {}
    kernels = {**methods.OWN_CHOICE, **pallas}
    if jax.default_backend() == "gpu":
        yield {}, lambda: methods.captured(cell.tenants, within_program, kernels)
        if not called:
            return
    yield from with_options(
        lambda tenants, options: methods.fused(tenants, options, within_program, kernels, True), cell
    )


def best_of(
    configurations: Callable[[Cell], Configurations], cell: Cell, want: Sequence[np.ndarray], limits: Limits
) -> Best:
    """Build every configuration, check what it computes and keep the fastest."""
    working: dict[int, tuple[Burst, float]] = {}
    tried: list[Row] = []
    try:
        for options, build in configurations(cell):
            try:
                for candidate in build():
                    burst = candidate if isinstance(candidate, Burst) else Burst(candidate, 1)
                    error, row = check(burst.candidate, options, want, limits.tolerance)
                    if "failed" not in row:
                        working[len(tried)] = burst, error
                    tried.append(row)
            except Exception as e:  # whatever a framework raises is the reason that its row gives
                tried.append({"how": "", "options": options, "failed": reason(e)})
    except CannotRun as e:
        tried.append({"how": "", "options": {}, "failed": reason(e)})
    if not working:
        return Best(None, 0.0, tuple(tried))
    runs = {i: burst for i, (burst, _) in working.items()}
    try:
        timings = timed(runs, CHOOSING, limits.seconds) if len(runs) > 1 else {}
    except Exception as e:  # out of memory, say, or a process that died
        tried.append({"how": "", "options": {}, "failed": f"while choosing: {reason(e)}"})
        return Best(None, 0.0, tuple(tried))
    for i, timing in timings.items():
        tried[i] = tried[i] | {"round_us_median": timing.median}
    chosen = min(timings, key=lambda i: timings[i].median) if timings else next(iter(runs))
    tried[chosen] = tried[chosen] | {"chosen": True}
    return Best(*working[chosen], tuple(tried))


def check(candidate: Candidate, options: Options, want: Sequence[np.ndarray], tolerance: float) -> tuple[float, Row]:
    """The error of a candidate's outputs, and its row among those tried; with `failed` if it is too large."""
    outputs = on_host(candidate)
    error = largest_error(outputs, list(want[: candidate.facts.get("compared", len(want))]))
    row: Row = {"how": candidate.how, "options": options, "error": error}
    wrong = not error <= tolerance  # a NaN is wrong too
    return error, row | ({"failed": f"outputs differ by {error:.1e}, more than {tolerance:.0e}"} if wrong else {})


def reason(e: Exception) -> str:
    return str(e) if isinstance(e, CannotRun) else brief(e)


def timed(bursts: Mapping[Any, Burst], repeats: int, seconds: float) -> dict[Any, Timing]:
    """Microseconds a round, contenders in turns."""
    timings = interleave({key: burst.candidate.run for key, burst in bursts.items()}, repeats=repeats, seconds=seconds)
    return {key: each_round(timing, bursts[key].rounds) for key, timing in timings.items()}


def in_a_row(burst: Burst) -> Burst:
    """Rounds that are issued while those before them are under way, as many at once; processes do so by themselves."""
    if burst.rounds > 1:
        return burst
    issue, last = burst.candidate.issue or burst.candidate.run, burst.candidate.run
    return Burst(replace(burst.candidate, run=partial(issued, issue, last, IN_A_ROW)), IN_A_ROW)


def measure_pair(
    cell: Cell, name: str, peer: Peer, ours: Best, want: Sequence[np.ndarray], limits: Limits
) -> list[Row]:
    """The rows of a pair: the peer's, and Coalesce's if there was anything to alternate with."""
    with cell.until_end:
        print(f"  {name}: building", file=sys.stderr, flush=True)
        theirs = best_of(peer.configurations, cell, want, limits)
        if theirs.burst is None:
            return [{"method": name, "kind": peer.kind, "failed": theirs.failed, "tried": theirs.tried}]
        theirs.burst.latencies.clear()  # those of choosing
        try:
            return in_turns({name: (peer.kind, theirs), OURS: (OURS, ours)}, limits)
        except Exception as e:  # out of memory, say, or a process that died
            return [{"method": name, "kind": peer.kind, "failed": f"while timing: {reason(e)}", "tried": theirs.tried}]


def measure_alone(ours: Best, limits: Limits) -> list[Row]:
    """Coalesce's row where no peer takes turns with it: what a tenant costs it as they become many."""
    try:
        return in_turns({OURS: (OURS, ours)}, limits)
    except Exception as e:
        return [{"method": OURS, "kind": OURS, "failed": f"while timing: {reason(e)}", "tried": ours.tried}]


def in_turns(contenders: Mapping[str, tuple[str, Best]], limits: Limits) -> list[Row]:
    """A row for each, by its method, of its kind: rounds by themselves in turns, then rounds in a row."""
    bursts = {key: best.burst for key, (_, best) in contenders.items() if best.burst}
    timings = timed(bursts, limits.repeats, limits.seconds)
    latencies = {key: list(burst.latencies) for key, burst in bursts.items()}
    rows = {key: in_a_row(burst) for key, burst in bursts.items()}
    sustained = timed(rows, max(3, limits.repeats // IN_A_ROW), limits.seconds)
    return [
        {"method": key, "kind": kind, **row_of(best, timings.get(key), sustained.get(key), latencies.get(key))}
        for key, (kind, best) in contenders.items()
    ]


def row_of(best: Best, timing: Timing | None, sustained: Timing | None, latencies: Sequence[float] | None) -> Row:
    if best.burst is None or timing is None or sustained is None:
        return {"failed": best.failed, "tried": best.tried}
    p99 = round(float(np.percentile(latencies, 99)) * 1e6, 1) if latencies else timing.p99
    return {
        "sustained_us_median": sustained.median,
        "round_us_median": timing.median,
        "round_us_p10": timing.p10,
        "round_us_p90": timing.p90,
        "latency_p99_us": p99,
        "repeats": timing.repeats,
        "error": best.error,
        "failed": "",
        "how": best.burst.candidate.how,
        "tried": best.tried,
    }


def free() -> None:
    """Give back what the last pair held: weights lie in cycles of closures, and PyTorch keeps what it freed."""
    gc.collect()
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
        gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()
