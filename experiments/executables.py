"""Claim: on a GPU a round is shorter where its program is cut into executables that are launched while others run.

    python -m experiments.executables --sets=resnet50 --lanes=16 --dtype=bfloat16
    python -m experiments.executables --sets=resnets,berts --notry_options

Times one round of a set of models, of mixed_tenants or a model of the zoo, in one executable, in as many as the cost
model chooses (`auto`) and in as many as are asked for, and in a program for each model, all in turns in one run: from
its first call until all results are there, until its last call is back (`host`), and where ten rounds follow each other
(`in a row`), which cuts do not help: a call more is as much work for the host. On a CPU kernels run as they are
launched, and cuts win nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from coalesce.models import NAMES
from experiments import methods, mixed_methods, mixed_tenants, pairs, settings
from experiments.cells import brief, largest_error, on_host
from experiments.list_flags import count, define
from experiments.measure import each_round, interleave
from experiments.methods import Candidate
from experiments.mixed_methods import Mix
from experiments.mixed_tenants import check_sets, fields_of_models, mix_of, SETS
from experiments.peers_common import Burst
from experiments.results import device_name, header, Row, save_rows, table


def asked(item: str) -> str:
    """Of --executables, if it is one."""
    return item if item == "auto" else str(count(item))


FLAGS = flags.FLAGS  # those of mixed_tenants and experiments/settings.py too
flags.adopt_module_key_flags(mixed_tenants)
define(asked, "executables", ["1", "auto", "2", "3"], "in how many the program is compiled", least=1)
flags.DEFINE_enum("policy", "auto", ["auto", "always", "never"], "what packs across families", flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    settings.begin(argv, ())
    check_sets((*SETS, *NAMES))
    conditions = {"dtype": FLAGS.dtype, "batch": FLAGS.batch, "lanes": FLAGS.lanes, "policy": FLAGS.policy}
    options = settings.options_to_try()[0]
    head = header(
        settings.command("executables"), FLAGS.device_name or device_name(), FLAGS.note, **conditions, options=options
    )
    path = settings.folder() / f"executables_{FLAGS.dtype}_lanes{FLAGS.lanes}.json"
    rows: list[Row] = []
    for name in FLAGS.sets:
        print(f"{name}: compiling", file=sys.stderr, flush=True)
        rows += [{"set": name, **row} for row in measured(mix_of(SETS.get(name, (name,)), fields_of_models()), options)]
        save_rows(path, head, rows)
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def measured(mix: Mix, options: dict[str, Any]) -> list[Row]:
    built, failed = ways(mix, options)
    want = on_host(next(iter(built.values())))
    errors = {name: largest_error(on_host(way), want) for name, way in built.items()}
    limits: dict[str, Any] = {"repeats": FLAGS.repeats, "seconds": FLAGS.seconds / 2}
    rounds = interleave({name: way.run for name, way in built.items()}, **limits)
    rows = {name: pairs.in_a_row(Burst(way, 1)) for name, way in built.items()}
    in_a_row = interleave({name: row.candidate.run for name, row in rows.items()}, **limits)
    host_us = {name: until_back(way) for name, way in built.items()}
    return failed + [
        {
            "asked": name,
            "round_us_median": rounds[name].median,
            "round_us_p10": rounds[name].p10,
            "round_us_p90": rounds[name].p90,
            "host_us_median": host_us[name],
            "sustained_us_median": each_round(in_a_row[name], rows[name].rounds).median,
            "repeats": rounds[name].repeats,
            "error_to_first": errors[name],
            "executables": way.facts.get("executables", len(mix)),
            "why": way.facts.get("why_executables", "a program for each model"),
            "failed": "",
        }
        for name, way in built.items()
    ]


def until_back(way: Candidate) -> float:
    """The median microseconds of a round's calls, none of which waits for another round."""
    times: list[float] = []
    for _ in range(FLAGS.repeats):
        start = time.perf_counter()
        results = way.run()
        times.append(time.perf_counter() - start)
        jax.block_until_ready(results)
    return round(statistics.median(times) * 1e6, 1)


def ways(mix: Mix, options: dict[str, Any]) -> tuple[dict[str, Candidate], list[Row]]:
    """What compiles, and rows of what does not."""
    builds: dict[str, Any] = {}
    for asked in FLAGS.executables:
        count = None if asked == "auto" else int(asked)
        builds[asked] = mixed_methods.fused(mix, options, FLAGS.policy, FLAGS.waste_bound, executables=count)
    if len(mix) > 1:
        builds["per_family"] = mixed_methods.one_by_one(mix, options, methods.fused)
    built: dict[str, Candidate] = {}
    failed: list[Row] = []
    for name, build in builds.items():
        try:
            built[name] = next(build)
            jax.block_until_ready(built[name].run())
        except jax.errors.JaxRuntimeError as e:
            built.pop(name, None)
            failed.append({"asked": name, "failed": brief(e)})
    return built, failed


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    text = [
        "# Programs in several executables",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Microseconds a round; *host*: until its calls are back; *in a row*: of ten that are issued one after the "
        "other. `per_family`: a program for each model.",
        table(
            ["set, executables asked for", "got", "p10", "median", "p90", "host", "in a row", "error"],
            [line(row) for row in rows if not row["failed"]],
        ),
        "\n".join(f"- {row['set']}, {row['asked']}: {row['failed'] or row['why']}" for row in rows),
    ]
    return "\n\n".join(text) + "\n"


def line(row: Row) -> list[str]:
    times = ("round_us_p10", "round_us_median", "round_us_p90", "host_us_median", "sustained_us_median")
    spread = [f"{row[key]:,.0f}" for key in times]
    return [f"{row['set']}, {row['asked']}", str(row["executables"]), *spread, f"{row['error_to_first']:.0e}"]


if __name__ == "__main__":
    app.run(main)
