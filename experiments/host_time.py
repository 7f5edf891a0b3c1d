"""What the runtime itself costs a request: host time at 16 lanes a bundle, and how fast payloads are staged.

    python -m experiments.host_time                     writes experiments/results/<device>/host_time.json and .md

Sixteen tenants of one family send a request each, over and over, several rounds ahead of the results. Their model adds
a weight to its input, so that nearly all that is spent is the runtime's: taking a request on, deciding, staging,
dispatching, and handing out the result. Host time is CPU time of the whole process, all threads together, a request;
the rest of what Python's threads take is JAX's, which may spin while it waits for a device. `wall` is the time of a
measurement over its requests. Through `infer` all coroutines share one event loop. The floor is a loop on one thread
without a runtime: 16 futures, their inputs side by side, one call, a copy for each future. Staging is timed by itself:
the bytes of 16 inputs, copied into what a call takes, with everything that this costs. Refused is what has no time left
at submit: past capacity most requests end so. Hosts differ by how fast they run Python, which `python` is: 100 objects
of a class with two slots, made and let go.

Inputs of 64 bytes are cheaper than all others by what XLA does, not by their size: what has less than 1,000 operations
of floating point it runs on the thread that calls, everything else on a thread of its own, which has to be woken up.
That takes 45 us more of processor time a call, 3 us a request, in the floor too. It is counted: whoever serves pays it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from coalesce.errors import DeadlineExceeded
from coalesce.runtime.runtime import Runtime
from coalesce.serving.staging import Lane, Staging
from experiments import own_flags
from experiments.list_flags import define_counts
from experiments.results import device_name, header, named, Row, save_rows, table

LANES = 16
AHEAD = 4  # rounds that are sent before the first is waited for
SLO_S = 10.0
TOO_SOON_S = 1e-6
TARGETS_US = {"submit": 30.0, "infer": 60.0}
STAGED_GBS = 3.0

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_integer("requests", 48_000, "requests of each measurement", lower_bound=LANES, flag_values=FLAGS)
define_counts("bytes", [64, 1024, 4096], "sizes of an input", least=4, flag_values=FLAGS)
define_counts("staged", [4096, 65536, 602112], "sizes of an input that is staged", least=4, flag_values=FLAGS)
flags.DEFINE_integer(
    "repeats", 5, "measurements of each kind, in turns; the median counts", lower_bound=1, flag_values=FLAGS
)


def model(params: jax.Array, x: jax.Array) -> jax.Array:
    return x + params


def runtime_of(size: int) -> Runtime:
    """Sixteen tenants whose inputs and results are so many bytes."""
    rt = Runtime(widths=(1, LANES), compiled=False)
    for i in range(LANES):
        weight = jnp.full((1, size // 4), float(i), jnp.float32)
        rt.add_tenant(f"t{i}", model, weight, example=(np.zeros((1, size // 4), np.float32),), slo=SLO_S)
    rt.warm_up(300.0)
    return rt


def inputs_of(size: int) -> list[np.ndarray]:
    return [np.full((1, size // 4), float(i), np.float32) for i in range(LANES)]


def submit(rt: Runtime, inputs: Sequence[np.ndarray], rounds: int) -> None:
    names = [f"t{i}" for i in range(LANES)]
    sent: deque[list[Any]] = deque()
    for _ in range(rounds):
        sent.append([rt.submit(name, x) for name, x in zip(names, inputs, strict=True)])
        if len(sent) >= AHEAD:
            for reply in sent.popleft():
                reply.result()
    for replies in sent:
        for reply in replies:
            reply.result()


def infer(rt: Runtime, inputs: Sequence[np.ndarray], rounds: int) -> None:
    """Each tenant has `AHEAD` clients, which send one request after another."""

    async def client(name: str, x: np.ndarray, count: int) -> None:
        for _ in range(count):
            await rt.infer(name, x)

    async def main() -> None:
        each = -(-rounds // AHEAD)
        await asyncio.gather(*(client(f"t{i}", x, each) for i, x in enumerate(inputs) for _ in range(AHEAD)))

    asyncio.run(main())


WAYS: dict[str, Callable[[Runtime, Sequence[np.ndarray], int], None]] = {"submit": submit, "infer": infer}


def served(rt: Runtime, way: str, size: int, requests: int) -> Row:
    before = rt.stats()
    cpu, python, wall = time.process_time(), python_s(), time.perf_counter()
    WAYS[way](rt, inputs_of(size), -(-requests // LANES))
    cpu, python, wall = time.process_time() - cpu, python_s() - python, time.perf_counter() - wall
    after = rt.stats()
    lanes = after.lanes - before.lanes
    return {
        "way": way,
        "bytes": size,
        "host_us": 1e6 * cpu / lanes,
        "python_us": 1e6 * python / lanes,
        "wall_us": 1e6 * wall / lanes,
        "lanes": lanes / (after.bundles - before.bundles),
    }


def refused(rt: Runtime, size: int, requests: int) -> Row:
    """Of requests that are not taken on, `AHEAD` rounds ahead too."""
    names, inputs = [f"t{i}" for i in range(LANES)], inputs_of(size)
    rounds = -(-requests // LANES)
    sent: deque[list[Any]] = deque()
    cpu, python, wall = time.process_time(), python_s(), time.perf_counter()
    for i in range(rounds + AHEAD):
        if i < rounds:
            sent.append([rt.submit(name, x, deadline=TOO_SOON_S) for name, x in zip(names, inputs, strict=True)])
        if i >= AHEAD:
            errors = [reply.exception() for reply in sent.popleft()]
            assert all(isinstance(error, DeadlineExceeded) for error in errors), errors
    cpu, python, wall = time.process_time() - cpu, python_s() - python, time.perf_counter() - wall
    each = {"host_us": cpu, "python_us": python, "wall_us": wall}
    spent = {name: 1e6 * took_s / (rounds * LANES) for name, took_s in each.items()}
    return {"way": "refused", "bytes": size, **spent, "lanes": 0.0}


class Pair:
    __slots__ = ("first", "second")

    def __init__(self, first: int, second: int) -> None:
        self.first = first
        self.second = second


def interpreter(count: int = 100_000) -> Row:
    """How fast this host runs Python."""
    cpu, wall = time.thread_time(), time.perf_counter()
    for i in range(count):
        Pair(i, i)
    cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
    spent = {"host_us": cpu, "python_us": cpu, "wall_us": wall}
    return {"way": "python", "bytes": 0, **{name: 1e8 * took_s / count for name, took_s in spent.items()}, "lanes": 0.0}


def python_s() -> float:
    """Processor time of Python's threads that are there."""
    threads = [thread.ident for thread in threading.enumerate() if thread.ident is not None]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads)


def floor(size: int, requests: int) -> Row:
    """What is left if nothing is decided, checked or counted."""
    bank = jnp.arange(LANES, dtype=jnp.float32)[:, None, None] + jnp.zeros((1, 1, size // 4), jnp.float32)
    inputs, slots = inputs_of(size), np.arange(LANES, dtype=np.int32)
    run = jax.jit(lambda bank, slots, x: x + bank[slots]).lower(bank, slots, np.stack(inputs)).compile()

    def bundle() -> None:
        futures = [Future[np.ndarray]() for _ in inputs]
        stack = np.empty((LANES, *inputs[0].shape), np.float32)
        for i, x in enumerate(inputs):
            stack[i] = x
        results = np.asarray(run(bank, slots, stack))
        for future, result in zip(futures, results, strict=True):
            future.set_running_or_notify_cancel()
            future.set_result(result.copy())
        for future in futures:
            future.result()

    bundles = -(-requests // LANES)
    for _ in range(bundles // 10):
        bundle()
    cpu, python, wall = time.process_time(), time.thread_time(), time.perf_counter()
    for _ in range(bundles):
        bundle()
    cpu, python, wall = time.process_time() - cpu, time.thread_time() - python, time.perf_counter() - wall
    each = {"host_us": cpu, "python_us": python, "wall_us": wall}
    spent = {name: 1e6 * took_s / (bundles * LANES) for name, took_s in each.items()}
    return {"way": "floor", "bytes": size, **spent, "lanes": float(LANES)}


def staged(size: int) -> Row:
    """Gigabytes a second into what a call takes, on this device."""
    structs = ((jax.ShapeDtypeStruct((LANES, 1, size // 4), np.float32),),)
    staging = Staging((LANES,), structs, (0,), packed=jax.default_backend() != "cpu", repeats=(False,))
    lanes = [Lane(i, [x]) for i, x in enumerate(inputs_of(size))]
    runs = max(10, 200_000_000 // (size * LANES))
    for _ in range(3):
        staging.take_back(staging.fill([lanes]))
    start = time.perf_counter()
    for _ in range(runs):
        staging.take_back(staging.fill([lanes]))
    took = time.perf_counter() - start
    return {"way": "staging", "bytes": size, "gbs": size * LANES * runs / took / 1e9}


def measured(sizes: Sequence[int], stages: Sequence[int], requests: int, repeats: int) -> Iterator[list[Row]]:
    """In turns, so that a busy machine is unfair to none; what is known after each."""
    runtimes = {size: runtime_of(size) for size in sizes}
    try:
        for size, rt in runtimes.items():
            for way in WAYS:
                served(rt, way, size, requests // 10)
        turns: list[list[Row]] = []
        for _ in range(repeats):
            through = [served(rt, way, size, requests) for size, rt in runtimes.items() for way in WAYS]
            through += [refused(rt, size, requests) for size, rt in runtimes.items()]
            floors = [*(floor(size, requests // 10) for size in sizes), interpreter()]
            turns.append([*through, *floors, *map(staged, stages)])
            yield [merged(rows) for rows in zip(*turns, strict=True)]
    finally:
        for rt in runtimes.values():
            rt.close()


def merged(rows: Sequence[Row]) -> Row:
    """The medians of what was measured."""
    return {
        key: value if isinstance(value, str | int) else round(median(row[key] for row in rows), 2)
        for key, value in rows[0].items()
    }


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    def line(row: Row) -> list[str]:
        if row["way"] == "staging":
            return ["staging", f"{row['bytes']:,}", "", "", "", "", f"{row['gbs']:.2f}", f"> {STAGED_GBS:g} GB/s"]
        target = f"< {TARGETS_US[row['way']]:g} us" if row["way"] in TARGETS_US and row["bytes"] <= 4096 else ""
        spent = [f"{row[name]:.1f}" for name in ("host_us", "python_us", "wall_us", "lanes")]
        return [row["way"], f"{row['bytes']:,}", *spent, "", target]

    spent = ["host time, us", "of Python's threads", "wall, us", "lanes a bundle"]
    text = [
        "# What a request costs its host",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        table(["", "bytes of an input", *spent, "GB/s", "target"], [line(row) for row in rows]),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str]) -> None:
    own_flags.parse("host_time", FLAGS, argv)
    head = header(own_flags.command("host_time", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, lanes=LANES)
    path = own_flags.folder(FLAGS) / named("host_time")
    for rows in measured(FLAGS.bytes, FLAGS.staged, FLAGS.requests, FLAGS.repeats):
        save_rows(path, head, rows)
        text = report(head, rows)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
