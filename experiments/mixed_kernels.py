"""Where a round of tenants of different architectures goes on a GPU: its kernels, and what lies between them.

    python -m experiments.mixed_kernels --set=everything --notry_options

All tenants of a set of models (those of mixed_tenants) in one fused program, packed across families by each of the
policies. Rounds alternate, without anything else between them; then a profiler's trace gives the kernels' time, and the
gaps in which the device waits for the host: where a launch is no part of a CUDA graph. Times of gaps are those of a
traced host, which is slower. For a GPU; results go to mixed_kernels_SET.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
from absl import app, flags

from experiments import mixed_methods, mixed_tenants, profiler, settings
from experiments.cells import brief
from experiments.list_flags import define_names
from experiments.measure import interleave, Timing
from experiments.mixed_tenants import fields_of_models, mix_of, SETS
from experiments.profiler import Launch
from experiments.results import device_name, header, Row, save_rows

POLICIES = ("never", "auto")
LONG_US = 3.0  # what lies between two kernels of a CUDA graph is shorter

FLAGS = flags.FLAGS  # those of mixed_tenants and experiments/settings.py too
flags.adopt_module_key_flags(mixed_tenants)
flags.DEFINE_enum("set", "everything", list(SETS), "the set of models", flag_values=FLAGS)
define_names("policies", list(POLICIES), "what packs across families", ("never", "auto", "always"), flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "how many rounds to trace", lower_bound=1, flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    settings.begin(argv, ())
    path = settings.folder() / f"mixed_kernels_{FLAGS.set}.json"
    mix = mix_of(SETS[FLAGS.set], fields_of_models())
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for policy in FLAGS.policies:
        for options in settings.options_to_try():
            print(f"  {policy}, {options}: compiling", file=sys.stderr, flush=True)
            try:
                (candidate,) = mixed_methods.fused(mix, options, policy, FLAGS.waste_bound)
                jax.block_until_ready(candidate.run())
            except jax.errors.JaxRuntimeError as e:
                print(f"  {policy}, {options}: {brief(e)}", file=sys.stderr, flush=True)
                continue
            runs[policy, json.dumps(options)] = candidate.run
    timings = interleave(runs, repeats=FLAGS.repeats, seconds=FLAGS.seconds)
    rows = [{"set": FLAGS.set, **row_of(key, run, timings[key])} for key, run in runs.items()]
    conditions = {"dtype": FLAGS.dtype, "batch": FLAGS.batch, "lanes": FLAGS.lanes, "fields": fields_of_models()}
    head = header(settings.command("mixed_kernels"), FLAGS.device_name or device_name(), FLAGS.note, **conditions)
    save_rows(path, head, rows)
    for row in rows:
        print(json.dumps(row))
    print(path)


def row_of(key: tuple[str, str], run: Callable[[], Any], timing: Timing) -> Row:
    policy, options = key
    rounds = profiler.equal_parts(profiler.launches_of([lambda _: waited(run)], FLAGS.rounds), FLAGS.rounds)
    return {
        "method": policy,
        "options": json.loads(options),
        "round_us_median": timing.median,
        "round_us_p10": timing.p10,
        "round_us_p90": timing.p90,
        "rounds": timing.repeats,
        **{name: round(median(map(count, rounds)), 1) for name, count in COUNTS.items() if rounds},
    }


def waited(run: Callable[[], Any]) -> Any:
    return jax.block_until_ready(run())


def long_gaps(launches: Sequence[Launch]) -> list[float]:
    return [gap.us for gap in profiler.gaps(launches) if gap.us > LONG_US]


def busy(launches: Sequence[Launch]) -> float:
    """Microseconds with a kernel or more."""
    return profiler.span(launches) - sum(gap.us for gap in profiler.gaps(launches))


COUNTS: dict[str, Callable[[Sequence[Launch]], float]] = {
    "launches": len,
    "kernels_us": profiler.total,
    "busy_us": busy,
    "long_gaps": lambda launches: len(long_gaps(launches)),
    "long_gaps_us": lambda launches: sum(long_gaps(launches)),
}


if __name__ == "__main__":
    app.run(main)
