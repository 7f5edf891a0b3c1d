"""Claim: where some programs take longer than others can wait, cuts keep the others' deadlines.

    python -m experiments.segments
    python -m experiments.segments --long_ms=20 --short_ms=2 --methods=whole,cut
    python -m experiments.segments --model=bert_base --dtype=bfloat16 --fields=vocabulary=1000 --rows=256 --widths=1,2 \
        --duration=10 --repeats=2                                                                 # on a GPU
    python -m experiments.segments --model=gru --longer=steps --fields=hidden=512,features=16     # one long loop

Tenants of a long program and of a short one, of one model with as many layers, or steps of a loop, as take `--long_ms`
and `--short_ms` alone on this device, ask at random times. The SLO of the short ones is less than the long program
takes. Served three ways, with the same arrivals:

    whole     Runtime(segments=1)
    three     Runtime(segments=3)
    cut       Runtime(), which cuts programs that the most urgent tenant cannot wait for, as it measured them
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import takewhile
from random import Random
from typing import Any

import jax
import numpy as np
from absl import flags

from coalesce.models import by_name, Model, NAMES
from coalesce.runtime.runtime import Runtime
from coalesce.scheduler import workloads
from coalesce.scheduler.workloads import Arrival
from experiments import own_flags
from experiments.cells import tenants_of
from experiments.list_flags import check_fields, define_counts, define_fields, define_names, fields_of
from experiments.live import Kind, Live, move_in, quantile_ms, SECOND, Seen, serve, settle
from experiments.results import device_name, header, Row, save_rows, table

METHODS = {"whole": 1, "three": 3, "cut": None}
MEASURED = (4, 8)  # layers, from which follows what others take

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
define_counts("widths", [1, 2, 4], "of executables", flag_values=FLAGS)
define_names("methods", list(METHODS), "which methods", METHODS, flag_values=FLAGS)
flags.DEFINE_float("long_ms", 20.0, "what the long program takes alone", flag_values=FLAGS)
flags.DEFINE_float("short_ms", 2.0, "and the short one", flag_values=FLAGS)
flags.DEFINE_float("long_slo_ms", 200.0, "from submit to result", flag_values=FLAGS)
flags.DEFINE_float("short_slo_ms", 14.0, "the same of the short program", flag_values=FLAGS)
flags.DEFINE_float("long_load", 0.3, "what the long program asks for of the device's time", flag_values=FLAGS)
flags.DEFINE_float("short_load", 0.2, "and the short one", flag_values=FLAGS)
flags.DEFINE_integer("tenants", 3, "of each program", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("model", "mlp", NAMES, "of all tenants", flag_values=FLAGS)
flags.DEFINE_string("longer", "layers", "the field of which the long program has more", flag_values=FLAGS)
define_fields("fields", ["width=512"], "fields of the model to set", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations", flag_values=FLAGS)
flags.DEFINE_integer("rows", 128, "of a request", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("duration", 30.0, "seconds of each run", lower_bound=0.05, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of the arrivals", flag_values=FLAGS)
flags.DEFINE_integer("repeats", 3, "runs of each method, with arrivals of their own", lower_bound=1, flag_values=FLAGS)


def model_of(layers: int) -> Model:
    fields = fields_of(FLAGS.fields)
    return by_name(FLAGS.model, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **{FLAGS.longer: layers}, **fields)


@cache
def alone_ms(layers: int) -> float:
    """The program of one tenant, by itself."""
    made = tenants_of(model_of(layers), 1, batch=FLAGS.rows)
    (params,), (inputs,) = made.params, made.inputs
    run = jax.jit(made.apply)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        jax.block_until_ready(run(params, *inputs))
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


def layers_for(target_ms: float) -> int:
    """So many that the program takes about so long."""
    few, more = MEASURED
    each_ms = max(1e-3, (alone_ms(more) - alone_ms(few)) / (more - few))
    layers = max(1, round(few + (target_ms - alone_ms(few)) / each_ms))
    return max(1, round(layers * target_ms / alone_ms(layers)))


def kind_of(text: str, layers: int, slo_ms: float) -> Kind:
    return Kind(text, model_of(layers), FLAGS.tenants, slo_ms / 1e3)


def lives_of(kind: Kind) -> list[Live]:
    made = tenants_of(kind.model, kind.count, batch=FLAGS.rows)
    return [
        Live(f"{kind.text}-{i}", kind, params, tuple(np.asarray(x) for x in inputs))
        for i, (params, inputs) in enumerate(zip(made.params, made.inputs, strict=True))
    ]


def arrivals(lives: Sequence[Live], rate: float, seed: str) -> list[Arrival]:
    """Of tenants of one kind, at random and in equal shares."""
    rng = Random(seed)
    end_ns = round(FLAGS.duration * SECOND)
    times = takewhile(lambda time_ns: time_ns < end_ns, workloads.poisson(rng, rate))
    return [Arrival(time_ns, rng.choice(lives).name) for time_ns in times]


def measure(method: str, short: Kind, long: Kind, rates: dict[str, float]) -> Iterator[Row]:
    """Of each run and each kind a row."""
    seen = Seen()
    kinds = {kind.text: lives_of(kind) for kind in (short, long)}
    lives = [live for own in kinds.values() for live in own]
    with Runtime(widths=FLAGS.widths, segments=METHODS[method], observers=[seen]) as rt:
        move_in(rt, lives)
        if METHODS[method] is None:
            settle(rt, lambda: seen.catalog)
        segments = {e.entries[0].family: 1 for e in seen.catalog.executables} | dict(seen.catalog.segments or {})
        for repeat in range(FLAGS.repeats):
            print(f"{method}, run {repeat + 1} of {FLAGS.repeats}", file=sys.stderr, flush=True)
            seen.clear()
            asked = [
                arrival
                for text, own in kinds.items()
                for arrival in arrivals(own, rates[text], f"{FLAGS.seed} {repeat} {text}")
            ]
            begin = time.monotonic()
            serve(rt, lives, sorted(asked))
            took = time.monotonic() - begin
            for text, own in kinds.items():
                cuts = segments[seen.tenants[own[0].name].families[0]]
                which = {"method": method, "run": repeat, "program": text, "segments": cuts}
                yield row_of(seen, [live.name for live in own], took, which)


def row_of(seen: Seen, names: Sequence[str], took_s: float, which: dict[str, Any]) -> Row:
    latencies = [ns for name in names for ns in seen.latencies_ns[name]]
    outcomes = sum((seen.outcomes[name] for name in names), start=type(seen.outcomes[names[0]])())
    return {
        **which,
        "asked": outcomes.total(),
        "attainment": round(seen.attainment(names), 4),
        "outcomes": dict(outcomes),
        "p50_ms": round(quantile_ms(latencies, 0.5), 3),
        "p99_ms": round(quantile_ms(latencies, 0.99), 3),
        "bundles": seen.bundles,
        "device_busy": round(seen.busy_ns / 1e9 / took_s, 3),
    }


def report(head: dict[str, Any], rows: Sequence[Row]) -> str:
    columns = ["method", "program", "segments", "requests", "attainment", "p50 ms", "p99 ms", "bundles", "device busy"]
    lines = []
    for method, program in dict.fromkeys((row["method"], row["program"]) for row in rows):
        own = [row for row in rows if (row["method"], row["program"]) == (method, program)]
        asked = sum(row["asked"] for row in own)
        share = sum(row["attainment"] * row["asked"] for row in own) / asked if asked else 1.0
        middle = sorted(own, key=lambda row: row["attainment"])[len(own) // 2]
        lines.append([
            method, program, str(own[0]["segments"]), f"{asked:,}", f"{share:.1%}", f"{middle['p50_ms']:.2f}",
            f"{middle['p99_ms']:.2f}", f"{middle['bundles']:,}", f"{middle['device_busy']:.0%}",
        ])  # fmt: skip
    settings = head["settings"]
    text = [
        "# Tenants of a long program beside tenants of a short one, cut and whole",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"The long program takes {settings['long_alone_ms']:.1f} ms alone, the short one "
        f"{settings['short_alone_ms']:.1f} ms; their SLOs are {settings['long_slo_ms']:g} and "
        f"{settings['short_slo_ms']:g} ms. Attainment over {settings['repeats']} runs of {settings['duration_s']:g} s; "
        "the other columns are of the run with the median attainment.",
        table(columns, lines),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str]) -> None:
    own_flags.parse("segments", FLAGS, argv)
    if FLAGS.longer in (given := fields_of(FLAGS.fields)):
        raise SystemExit(f"--longer={FLAGS.longer} is set by --fields, too")
    try:
        check_fields(FLAGS.model, {**given, FLAGS.longer: MEASURED[0]})
    except ValueError as e:
        raise SystemExit(f"--longer={FLAGS.longer}: {e}") from None
    path, rows = own_flags.folder(FLAGS) / "segments.json", list[Row]()
    layers = {"short": layers_for(FLAGS.short_ms), "long": layers_for(FLAGS.long_ms)}
    took_ms = {text: alone_ms(own) for text, own in layers.items()}
    short = kind_of("short", layers["short"], FLAGS.short_slo_ms)
    long = kind_of("long", layers["long"], FLAGS.long_slo_ms)
    rates = {"short": FLAGS.short_load / took_ms["short"] * 1e3, "long": FLAGS.long_load / took_ms["long"] * 1e3}
    settings = {
        "model": FLAGS.model, "longer": FLAGS.longer, "fields": FLAGS.fields, "dtype": FLAGS.dtype,
        "rows": FLAGS.rows, "layers": layers, "tenants": FLAGS.tenants, "seed": FLAGS.seed,
        "long_alone_ms": round(took_ms["long"], 3), "short_alone_ms": round(took_ms["short"], 3),
        "long_slo_ms": FLAGS.long_slo_ms, "short_slo_ms": FLAGS.short_slo_ms, "duration_s": FLAGS.duration,
        "rates": {text: round(rate, 2) for text, rate in rates.items()}, "repeats": FLAGS.repeats,
    }  # fmt: skip
    head = header(own_flags.command("segments", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **settings)
    print(settings, file=sys.stderr, flush=True)
    for method in FLAGS.methods:
        for row in measure(method, short, long, rates):
            rows.append(row)
            save_rows(path, head, rows)
            path.with_suffix(".md").write_text(report(head, rows), encoding="utf-8")
    print(report(head, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
