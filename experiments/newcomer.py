"""What others notice of a newcomer: latency while families are added, against latency while nothing is.

    python -m experiments.newcomer                      writes experiments/results/<device>/newcomer.json and .md
    python -m experiments.newcomer --model=resnet50 --dtype=bfloat16 --fields=classes=1000 --vary=classes --families=1 \
        --turns=2 --widths=1,2,4
    python -m experiments.newcomer --ways=present,before

Tenants of one family are asked at a steady rate, from a thread that sends each request when its time has come. In turns
nothing else happens for a while, and new families are added, one after another, each with all of its executables; then
they go again. What can be reached is measured too: on a CPU newcomers are compiled in another process, on as many of
its threads as there are processors, so in a third kind of turn nothing is added, and as many processes of that one's
priority do nothing but compute. Latency is from submit to the moment at which whoever asked is called back. Nothing
that was compiled before is found again: each newcomer has another size, the field `vary` counted on, and the runtime
keeps nothing on disk. Families are added in each of several `ways` (experiments/newcomer_ways.py), in turns; the target
is for the first. Newcomers' weights and examples are made before anything is measured: users have them, and here
JAX compiles for them.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from absl import flags

from coalesce.models import by_name, NAMES
from coalesce.runtime.compiler import LESS_URGENT
from coalesce.runtime.runtime import Runtime
from experiments import own_flags
from experiments.cells import tenants_of
from experiments.list_flags import define_counts, define_fields, define_names, fields_of
from experiments.methods import Tenants
from experiments.newcomer_ways import WAYS
from experiments.results import device_name, header, Row, save_rows, table

TIMES = 2.0  # that the p99 may rise by
COLUMNS = "requests", "p50_ms", "p99_ms", "p999_ms"
SLO_S = 5.0

# As coalesce.runtime.compiler steps back, and then one thread of it without an end.
COMPUTING = f"""
import os

os.nice({LESS_URGENT})
if hasattr(os, "SCHED_IDLE"):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True:
    pass
"""

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_integer("tenants", 4, "that are asked", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("model", "mlp", NAMES, "of all tenants", flag_values=FLAGS)
define_fields("fields", ["width=64", "layers=8"], "fields of the model to set", flag_values=FLAGS)
flags.DEFINE_string("vary", "width", "the one of them that newcomers have larger", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations", flag_values=FLAGS)
flags.DEFINE_float("rate", 400.0, "requests a second", lower_bound=1.0, flag_values=FLAGS)
flags.DEFINE_integer("families", 4, "that are added in a turn", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("turns", 5, "of each kind", lower_bound=1, flag_values=FLAGS)
define_counts("widths", [1, 2, 4, 8], "lanes of executables", flag_values=FLAGS)
define_names("ways", ["present"], "to take newcomers in", WAYS, flag_values=FLAGS)


@dataclass
class Added:
    """What others saw while families were added in one way, and how long that took."""

    latencies_s: list[float] = field(default_factory=list)
    s: float = 0.0


class Clients:
    """A thread that asks, and the latencies in seconds of what was sent while `into` was set to a list."""

    def __init__(self, rt: Runtime, names: Sequence[str], x: np.ndarray, rate: float) -> None:
        self.into: list[float] = []
        self._rt, self._names, self._x, self._gap_s = rt, names, x, 1 / rate
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        due, i = time.perf_counter(), 0
        while not self._stop.is_set():
            due += self._gap_s
            time.sleep(max(0.0, due - time.perf_counter()))
            self._ask(self._names[i % len(self._names)], due)
            i += 1

    def _ask(self, name: str, due: float) -> None:
        """Latency counts from when it was due: a client that cannot send is kept waiting too."""
        into = self.into
        reply = self._rt.submit(name, self._x)
        reply.add_done_callback(lambda _: into.append(time.perf_counter() - due))

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def family(more: int, count: int) -> Tenants:
    """Tenants of one family, with the field that varies so much larger."""
    fields = fields_of(FLAGS.fields)
    if FLAGS.vary not in fields:
        raise SystemExit(f"what is {FLAGS.vary}? --vary is one of --fields")
    fields[FLAGS.vary] += more
    return tenants_of(by_name(FLAGS.model, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **fields), count, batch=1)


def add(rt: Runtime, prefix: str, made: Tenants) -> tuple[list[str], np.ndarray]:
    names = [f"{prefix}{i}" for i in range(len(made.params))]
    x = np.asarray(made.inputs[0][0])
    for name, params in zip(names, made.params, strict=True):
        rt.add_tenant(name, made.apply, params, example=(x,), slo=SLO_S)
    return names, x


@contextmanager
def computing() -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTING]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure() -> Iterator[Row]:
    """What is known after each turn."""
    widths = FLAGS.widths
    quiet: list[float] = []
    beside: list[float] = []
    busy = {way: Added() for way in FLAGS.ways}
    fresh = iter([family(more, 2) for more in range(1, FLAGS.turns * len(busy) * FLAGS.families + 1)])
    with Runtime(widths=widths, compiled=False) as rt:
        names, x = add(rt, "served", family(0, FLAGS.tenants))
        rt.warm_up(600.0)
        with Clients(rt, names, x, FLAGS.rate) as clients:
            time.sleep(0.3)
            for turn in range(FLAGS.turns):
                took = 0.0
                for way, added in busy.items():
                    with WAYS[way]():
                        clients.into, begin = added.latencies_s, time.perf_counter()
                        newcomers = [add(rt, f"new{turn}.{k}.", next(fresh))[0] for k in range(FLAGS.families)]
                        rt.warm_up(600.0)
                        took = time.perf_counter() - begin
                    clients.into = []
                    added.s += took
                    for name in itertools.chain(*newcomers):
                        rt.remove_tenant(name)
                    time.sleep(0.2)
                clients.into = quiet
                time.sleep(took)
                with computing():
                    time.sleep(0.2)
                    clients.into = beside
                    time.sleep(took)
                    clients.into = []
                time.sleep(0.1)  # the last ones come in
                failed = dict(rt.health().failed)
                assert not failed, f"executables failed: {failed}"
                yield row_of(list(quiet), list(beside), busy, (turn + 1) * FLAGS.families)


def row_of(quiet: Sequence[float], beside: Sequence[float], busy: Mapping[str, Added], families: int) -> Row:
    steady = quantiles(quiet)
    row: Row = {"families": families, **{f"steady_{name}": value for name, value in steady.items()}}
    row |= {f"beside_{name}": value for name, value in quantiles(beside).items()}
    row["beside_ratio"] = round(row["beside_p99_ms"] / steady["p99_ms"], 2)
    for way, added in busy.items():
        prefix = f"{way}_" if way != FLAGS.ways[0] else ""
        row[f"{prefix}family_s"] = round(added.s / families, 3)
        row |= {f"{prefix}adding_{name}": value for name, value in quantiles(list(added.latencies_s)).items()}
        row[f"{prefix}p99_ratio"] = round(row[f"{prefix}adding_p99_ms"] / steady["p99_ms"], 2)
    return row


def quantiles(latencies_s: Sequence[float]) -> dict[str, Any]:
    p50, p99, p999 = (round(1e3 * float(q), 3) for q in np.quantile(latencies_s, (0.5, 0.99, 0.999)))
    return {"requests": len(latencies_s), "p50_ms": p50, "p99_ms": p99, "p999_ms": p999}


def report(head: Mapping[str, Any], row: Row) -> str:
    lines = [
        [text, *(f"{row[f'{kind}_{name}']:,}" for name in COLUMNS)]
        for kind, text in (("steady", "steady"), ("beside", "beside processes that compute"), ("adding", "adding"))
    ]
    others = [kind.removesuffix("_p99_ratio") for kind in row if kind.endswith("_p99_ratio")]
    for way in others:
        lines.append([f"adding: {way}", *(f"{row[f'{way}_adding_{name}']:,}" for name in COLUMNS)])
    shown = table(["", "requests", "p50, ms", "p99, ms", "p99.9, ms"], lines)
    text = [
        "# What others notice of a newcomer",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        shown,
        f"p99 while {row['families']} families were added, one in {row['family_s']:.2f} s: "
        f"{row['p99_ratio']:.2f} times that of steady serving; the target is {TIMES:g}.\n"
        f"Beside processes that only compute, one for each processor and at the compiler's priority, it is "
        f"{row['beside_ratio']:.2f} times that.",
        *(f"{way}: {row[f'{way}_p99_ratio']:.2f} times, a family in {row[f'{way}_family_s']:.2f} s." for way in others),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str]) -> None:
    own_flags.parse("newcomer", FLAGS, argv)
    head = header(own_flags.command("newcomer", FLAGS), FLAGS.device_name or device_name(), FLAGS.note)
    path = own_flags.folder(FLAGS) / "newcomer.json"
    for row in measure():
        save_rows(path, head, [row])
        text = report(head, row)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
