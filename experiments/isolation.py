"""Claim: as tenants are added, latency under Coalesce grows slower than under time multiplexing.

    python -m experiments.isolation
    python -m experiments.isolation --model=resnet50 --fields= --dtype=bfloat16 --engine=torch --tenants=1,4,16 \
        --duration=3 --budget_s=80

The question of the paper's figure 5. Every tenant has one request under way at any time: when its result has come, it
sends the next. Ways to serve them, of which the first two are one runtime under two policies:

    coalescing       the runtime
    fifo             the same with coalescing off: one request at a time, in the order of arrival (time multiplexing)
    processes        a process a tenant, sliced in time by the driver of the device, or the operating system
    processes_mps    the same side by side under NVIDIA's MPS; needs a GPU

Latencies of the runtime are from submit to result, with copies; those of processes from dispatch to completion, in the
process, of inputs that lie on the device.
Rows that the results have are not measured again, so that the same command goes on where --budget_s stopped it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import chain
from typing import Any, NamedTuple

from absl import flags

from coalesce.models import by_name, NAMES
from coalesce.runtime.runtime import Runtime
from experiments import own_flags, peers_torch
from experiments.isolation_report import plot, report
from experiments.list_flags import define_counts, define_fields, define_names, fields_of
from experiments.live import Kind, Live, move_in, quantile_ms, Seen, tenants
from experiments.peers_common import CannotRun, OneTenant
from experiments.peers_processes import mps, mps_control, Workers
from experiments.policies import POLICIES
from experiments.results import device_name, header, load_rows, OUT, Row, save_rows
from experiments.switching import Switching

METHODS = ("coalescing", "fifo", "processes", "processes_mps")
PATIENT_S = 60.0  # nobody is refused: latency is the question

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_enum("model", "mlp", NAMES, "the model of all tenants", flag_values=FLAGS)
define_fields("fields", ["width=64"], "fields of the model to set", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of weights and activations", flag_values=FLAGS)
flags.DEFINE_enum("engine", "jax", ["jax", "torch"], "what runs in processes; torch needs a GPU", flag_values=FLAGS)
define_counts("tenants", [1, 2, 4, 8, 16], "numbers of tenants", flag_values=FLAGS)
define_names("methods", list(METHODS), "which methods", METHODS, flag_values=FLAGS)
flags.DEFINE_integer("most_processes", 16, "processes are left out with more tenants", flag_values=FLAGS)
flags.DEFINE_float("duration", 5.0, "seconds of each cell", lower_bound=0.05, flag_values=FLAGS)
flags.DEFINE_float("budget_s", None, "no cell starts after so many seconds", flag_values=FLAGS)


class Cell(NamedTuple):
    tenants: int
    method: str


def fields() -> dict[str, Any]:
    return fields_of(FLAGS.fields)


def closed_loop(rt: Runtime, lives: Sequence[Live], duration_s: float) -> None:
    """Each tenant sends its next request when it has the result of the last one."""
    end_s = time.monotonic() + duration_s
    left, failed = threading.Semaphore(0), list[Exception]()

    def send(live: Live) -> None:
        if time.monotonic() >= end_s:
            left.release()
            return
        rt.submit(live.name, *live.inputs).add_done_callback(lambda reply: answered(live, reply))

    def answered(live: Live, reply: Future[Any]) -> None:
        try:
            reply.result()
            send(live)
        except Exception as e:  # it sends nothing more, and who waits for all of them is told
            failed.append(e)
            left.release()

    for live in lives:
        send(live)
    for _ in lives:
        left.acquire()
    if failed:
        raise failed[0]


def in_runtime(cells: Sequence[Cell]) -> Generator[tuple[Cell, Mapping[str, list[int]]], None, None]:
    """Latencies by tenant of each cell. All tenants are there from the beginning, so that nothing is compiled while
    others are served, for which a GPU times no kernels; in a cell the first ones ask."""
    if not cells:
        return
    seen, most = Seen(), max(cell.tenants for cell in cells)
    model = by_name(FLAGS.model, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **fields())
    lives = tenants([Kind(FLAGS.model, model, most, PATIENT_S)])
    widths = [width for width in (1, 2, 4, 8, 16, 32) if width < 2 * most]
    switch = Switching(POLICIES[cells[0].method])
    with Runtime(policy=switch, widths=widths, capacity=most, observers=[seen]) as rt:
        move_in(rt, lives)
        for cell in sorted(cells):
            switch.change(POLICIES[cell.method])
            closed_loop(rt, lives[: cell.tenants], min(0.5, FLAGS.duration))
            rt.drain(PATIENT_S)
            seen.clear()
            closed_loop(rt, lives[: cell.tenants], FLAGS.duration)
            rt.drain(PATIENT_S)
            yield cell, seen.latencies_ns


def in_processes(count: int, under_mps: bool) -> Mapping[str, list[int]]:
    if count > FLAGS.most_processes:
        raise CannotRun(f"left out above {FLAGS.most_processes} tenants: so many processes are no way to serve")
    if FLAGS.engine == "torch":
        peers_torch.check_device(None)
    with ExitStack() as stack:
        env = stack.enter_context(mps(mps_control())) if under_mps else dict(os.environ)
        cache = {
            "JAX_COMPILATION_CACHE_DIR": stack.enter_context(tempfile.TemporaryDirectory()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        if FLAGS.engine == "torch":
            cache["JAX_PLATFORMS"] = "cpu"  # JAX draws the weights only
        tenants = [OneTenant(FLAGS.model, fields(), FLAGS.dtype, i, FLAGS.engine) for i in range(count)]
        workers = stack.enter_context(Workers(tenants, {**env, **cache}))
        workers.burst(3)
        begin = time.perf_counter()
        workers.burst(20)
        requests = max(20, round(FLAGS.duration * 20 / (time.perf_counter() - begin)))
        bursts = workers.burst(requests)
    return {f"tenant{i}": [round(s * 1e9) for s in own] for i, own in enumerate(bursts)}


def apart(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Mapping[str, list[int]] | CannotRun]]:
    for cell in cells:
        try:
            yield cell, in_processes(cell.tenants, under_mps=cell.method == "processes_mps")
        except CannotRun as e:
            yield cell, e


def row_of(cell: Cell, latencies: Mapping[str, list[int]] | CannotRun) -> Row:
    row = {**cell._asdict(), "failed": ""}
    if isinstance(latencies, CannotRun):
        return {**row, "failed": str(latencies)}
    every = [latency for own in latencies.values() for latency in own]
    medians = [quantile_ms(own, 0.5) for own in latencies.values()]
    tails = [quantile_ms(own, 0.99) for own in latencies.values()]
    quantiles = {f"p{q * 100:g}_ms": round(quantile_ms(every, q), 4) for q in (0.1, 0.5, 0.9, 0.99)}
    return {
        **row,
        **quantiles,
        "requests": len(every),
        "fastest_tenant_p50_ms": round(min(medians), 4),
        "slowest_tenant_p50_ms": round(max(medians), 4),
        "slowest_tenant_p99_ms": round(max(tails), 4),
    }


def main(argv: Sequence[str]) -> None:
    begun_s = time.monotonic()
    own_flags.parse("isolation", FLAGS, argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the processes need the device's memory too
    settings = {"model": FLAGS.model, "fields": fields(), "duration_s": FLAGS.duration, "dtype": FLAGS.dtype}
    settings["engine"] = FLAGS.engine
    head = header(
        own_flags.command("isolation", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **settings
    )
    path = own_flags.folder(FLAGS) / f"isolation_{FLAGS.model}_{FLAGS.dtype}.json"
    title = f"Latency of {FLAGS.model} as tenants are added"
    rows = load_rows(path, head, instead=OUT)
    done = {Cell(row["tenants"], row["method"]) for row in rows}
    wanted = [Cell(n, method) for n in FLAGS.tenants for method in FLAGS.methods]
    missing = [cell for cell in wanted if cell not in done]
    served = in_runtime([cell for cell in missing if cell.method in POLICIES])
    for cell, latencies in chain(served, apart([cell for cell in missing if cell.method not in POLICIES])):
        rows = sorted([*rows, row_of(cell, latencies)], key=order)
        print(f"after {time.monotonic() - begun_s:.0f} s: {cell}", file=sys.stderr, flush=True)
        save_rows(path, head, rows)
        path.with_suffix(".md").write_text(report(title, head, rows), encoding="utf-8")
        if FLAGS.budget_s is not None and time.monotonic() - begun_s > FLAGS.budget_s:
            print("the budget is spent; the same command goes on from here", file=sys.stderr)
            break
    served.close()
    print(report(title, head, rows))
    print(plot(path.with_suffix(".png"), title, rows))


def order(row: Row) -> tuple[int, int]:
    return row["tenants"], METHODS.index(row["method"])


if __name__ == "__main__":
    main(sys.argv[1:])
