"""Where a round's time goes on a GPU: microseconds by kernel, from the profiler's trace, of what Coalesce runs.

    python -m experiments.kernel_times --model=resnet50 --dtype=bfloat16 --tenants=16 --kernels=pallas

Kernels of superkernels carry their pack's dimensions in their name where we wrote them, and XLA's name otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import app, flags

from coalesce.models import by_name, NAMES
from experiments import methods, settings
from experiments.cells import tenants_of
from experiments.measure import interleave
from experiments.profiler import Line, lines, traced

KERNELS = {"own": "", "pallas": methods.by_pallas}

FLAGS = flags.FLAGS  # experiments/settings.py has more of them
flags.adopt_module_key_flags(settings)
flags.DEFINE_enum("model", "resnet50", NAMES, "the model")
flags.DEFINE_integer("tenants", 16, "how many tenants of it", lower_bound=1)
flags.DEFINE_enum("kernels", "own", list(KERNELS), "whose superkernels: as Coalesce chooses, or Pallas wherever it can")
flags.DEFINE_integer("rounds", 20, "how many rounds to trace", lower_bound=1)
flags.DEFINE_integer("top", 40, "how many kernels to list", lower_bound=1)


def trace(run: Callable[[], Any], rounds: int) -> list[Line]:
    """Kernels by time, of the rounds that a call runs."""
    jax.block_until_ready(run())
    with traced() as launches:
        for _ in range(rounds):
            jax.block_until_ready(run())
    return lines(launches, rounds)


def main(argv: Sequence[str]) -> None:
    settings.begin(argv, ())
    if jax.default_backend() != "gpu":
        raise app.UsageError("needs a GPU: elsewhere the profiler's trace has no kernels")
    model = by_name(FLAGS.model, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype)
    tenants = tenants_of(model, FLAGS.tenants, FLAGS.batch)
    choice = {FLAGS.kernels: KERNELS[FLAGS.kernels] or methods.choose}
    for options in settings.options_to_try():
        (candidate,) = methods.fused(tenants, options, kernels=choice)
        wall = interleave({"": candidate.run}, repeats=FLAGS.repeats, seconds=FLAGS.seconds)[""]
        found = trace(candidate.run, FLAGS.rounds)
        total, launches = sum(line.us for line in found), sum(line.times for line in found)
        print(f"\n{FLAGS.model} x{FLAGS.tenants} {FLAGS.dtype}, {FLAGS.kernels}, {options or 'default options'}")
        print(f"{wall.median:.0f} us a round; kernels {total:.0f} us in {launches:.0f} launches")
        for line in found[: FLAGS.top]:
            print(f"{line.us:9.1f} us {line.times:7.1f} x {line.us / max(line.times, 1e-9):8.2f}  {line.name}")
        sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
