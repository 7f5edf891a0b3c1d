"""Claim: many tenants of many architectures are planned in seconds.

    python -m experiments.planning_time
    python -m experiments.planning_time --models=mlp,lstm,gru --tenants=9

Traces tenants of every model of coalesce.models, with shapes for weights, and fuses them for a GPU; nothing is compiled
and nothing runs. What counts is the CPU time of this process, which other processes disturb less than a clock's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

import coalesce
from coalesce.compile import PLATFORMS
from coalesce.models import by_name, NAMES
from experiments import own_flags
from experiments.list_flags import define_names
from experiments.results import device_name, header, Row, save_rows, table

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
define_names("models", list(NAMES), "models of the tenants, in turns", NAMES, flag_values=FLAGS)
flags.DEFINE_integer("tenants", 64, "tenants in all", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("policy", "auto", ["auto", "always", "never"], "what runs together across models", flag_values=FLAGS)
flags.DEFINE_enum("platform", "gpu", PLATFORMS, "what is planned for", flag_values=FLAGS)


def traced(models: Sequence[str], tenants: int) -> list[coalesce.Program]:
    """Tenants of the models in turns, in float32 at batch 1, without values."""
    kinds = [by_name(name) for name in models]
    shapes = [jax.eval_shape(kind.init, jax.random.key(0)) for kind in kinds]
    at = [i % len(kinds) for i in range(tenants)]
    return [
        coalesce.trace(kinds[k].apply, shapes[k], *kinds[k].inputs(1), name=f"{models[k]} {i}")
        for i, k in enumerate(at)
    ]


def plan(programs: Sequence[coalesce.Program], **options: Any) -> tuple[coalesce.Fused, float]:
    """The fused program, and the CPU seconds that fusing took."""
    start = time.process_time()
    fused = coalesce.fuse(programs, **options)
    return fused, time.process_time() - start


def main(argv: Sequence[str]) -> None:
    own_flags.parse("planning_time", FLAGS, argv)
    folder = own_flags.folder(FLAGS)
    start = time.process_time()
    programs = traced(FLAGS.models, FLAGS.tenants)
    tracing = time.process_time() - start
    fused, fusing = plan(programs, policy=FLAGS.policy, platform=FLAGS.platform)
    rows: list[Row] = [{"what": "trace", "seconds": tracing}, {"what": "fuse, all of it", "seconds": fusing}]
    rows += [{"what": step.name, "seconds": step.seconds} for step in fused.steps]  # by the clock
    command = own_flags.command("planning_time", FLAGS)
    conditions = {"tenants": FLAGS.tenants, "models": FLAGS.models, "policy": FLAGS.policy}
    head = header(command, FLAGS.device_name or device_name(), FLAGS.note, **conditions)
    save_rows(folder / "planning_time.json", head, rows)
    lines = [[row["what"], f"{row['seconds']:.2f}"] for row in rows]
    text = (
        f"# {FLAGS.tenants} tenants of {len(FLAGS.models)} models: seconds to plan\n\n"
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. Policy {FLAGS.policy!r} for a "
        f"{FLAGS.platform}: {fused.report}.\n\n    {command}\n\n"
        "CPU seconds of tracing and of `fuse`, then the passes over the bundle by the clock:\n\n"
        f"{table(['', 'seconds'], lines)}\n"
    )
    (folder / "planning_time.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
