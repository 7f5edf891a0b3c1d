"""Claim: MLPerf's LoadGen drives the runtime in its Server scenario to VALID at a stated rate.

    python -m experiments.loadgen --rate=400 --latency_ms=50
    python -m experiments.loadgen --rate=400 --latency_ms=50 --duration=600 --queries=270336   the sizes of a submission
    python -m experiments.loadgen --tenants="resnet50.dtype='bfloat16';param_dtype='bfloat16':16" --latency_ms=15 \
        --rate=2000 --duration=20

LoadGen sends single samples as a Poisson process at the rate, for at least so long and so many, and says VALID if 99%
of them are answered within the latency. Samples go round over the tenants. Every sample is answered, as LoadGen's rules
ask: one that the runtime refuses, since its deadline cannot be met, is sent again with a deadline far away.

LoadGen comes as `mlcommons-loadgen` (the extra coalesce-jax[loadgen]).
"""

from __future__ import annotations

import array
import re
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from absl import flags

try:
    import mlperf_loadgen
except ImportError as e:
    raise SystemExit("LoadGen is not installed: pip install 'coalesce-jax[loadgen]'") from e

from coalesce.errors import DeadlineExceeded, QueueFull
from coalesce.runtime.runtime import Runtime
from experiments import own_flags
from experiments.live import Live, move_in, read_kind, Seen, tenants
from experiments.policies import POLICIES
from experiments.results import device_name, header, Row, save_rows, table

LATER_S = 60.0  # the deadline of what was refused

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_list(
    "tenants", ["mlp.width=64:16"], "who is served: MODEL[.FIELD=VALUE;...]:COUNT", flag_values=FLAGS
)
flags.DEFINE_float("rate", 400.0, "queries a second", lower_bound=0.1, flag_values=FLAGS)
flags.DEFINE_float("latency_ms", 50.0, "that 99% of queries must be answered within", flag_values=FLAGS)
flags.DEFINE_float("duration", 60.0, "seconds, at least", lower_bound=0.01, flag_values=FLAGS)
flags.DEFINE_integer("queries", 10_000, "at least", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("policy", "coalescing", list(POLICIES), "who decides", flag_values=FLAGS)


class Served:
    """The runtime as LoadGen's system under test."""

    def __init__(self, rt: Runtime, lives: Sequence[Live]) -> None:
        self._rt, self._lives = rt, lives
        self.refused = 0
        self.wrong = 0  # answers that are not finite
        self.failures: list[BaseException] = []
        self._ended: SimpleQueue[tuple[int, Live, Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._answer_all, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended.put(None)
        self._thread.join()

    def issue(self, samples: Sequence[Any]) -> None:
        for sample in samples:
            self._send(sample.id, self._lives[sample.index % len(self._lives)], None)

    def flush(self) -> None:
        """Nothing is held back."""

    def _send(self, number: int, live: Live, deadline_s: float | None) -> None:
        try:
            reply = self._rt.submit(live.name, *live.inputs, deadline=deadline_s)
        except Exception as e:  # LoadGen waits for an answer all the same
            reply = Future[Any]()
            reply.set_exception(e)
        reply.add_done_callback(lambda done: self._ended.put((number, live, done)))

    def _answer_all(self) -> None:
        """What has ended meanwhile is told LoadGen in one call: each gives the interpreter's lock away."""
        more = True
        while more:
            ended = [self._ended.get(), *(self._ended.get() for _ in range(self._ended.qsize()))]
            more = None not in ended
            answers, refused = [], []
            for number, live, done in filter(None, ended):
                if isinstance(done.exception(), DeadlineExceeded | QueueFull):
                    refused.append((number, live))
                else:
                    answers.append((number, self._answer(done)))
            if answers:
                told = [mlperf_loadgen.QuerySampleResponse(n, *own.buffer_info()) for n, own in answers]
                mlperf_loadgen.QuerySamplesComplete(told)
            self.refused += len(refused)
            for number, live in refused:
                self._send(number, live, LATER_S)

    def _answer(self, done: Future[Any]) -> array.array[int]:
        """Nothing for what failed."""
        try:
            result = done.result()
            self.wrong += not np.isfinite(result).all()
            return array.array("B", result.tobytes())
        except Exception as e:
            self.failures.append(e)
            return array.array("B")


def settings() -> Any:
    chosen = mlperf_loadgen.TestSettings()
    chosen.scenario = mlperf_loadgen.TestScenario.Server
    chosen.mode = mlperf_loadgen.TestMode.PerformanceOnly
    chosen.server_target_qps = FLAGS.rate
    chosen.server_target_latency_ns = round(FLAGS.latency_ms * 1e6)
    chosen.server_target_latency_percentile = 0.99
    chosen.min_duration_ms = round(FLAGS.duration * 1e3)
    chosen.min_query_count = FLAGS.queries
    return chosen


def drive(served: Served, samples: int, folder: Path) -> dict[str, str]:
    """Runs the test; what LoadGen's summary says, by name."""
    logs = mlperf_loadgen.LogSettings()
    logs.log_output = mlperf_loadgen.LogOutputSettings()
    logs.log_output.outdir = str(folder)
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = False
    system = mlperf_loadgen.ConstructSUT(served.issue, served.flush)
    library = mlperf_loadgen.ConstructQSL(samples, samples, lambda _: None, lambda _: None)
    try:
        mlperf_loadgen.StartTestWithLogSettings(system, library, settings(), logs)
    finally:
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroySUT(system)
    return read_summary((folder / "mlperf_log_summary.txt").read_text(encoding="utf-8"))


def read_summary(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\s*([^:\n]+?)\s*: +(\S.*?)\s*$", text, re.MULTILINE))


def row_of(summary: dict[str, str], served: Served, seen: Seen) -> Row:
    return {
        "policy": FLAGS.policy,
        "rate": FLAGS.rate,
        "latency_ms": FLAGS.latency_ms,
        "result": summary["Result is"],
        "because": [name for name, says in summary.items() if name.lower().endswith("satisfied") and says != "Yes"],
        "completed_per_second": float(summary["Completed samples per second"]),
        "scheduled_per_second": float(summary["Scheduled samples per second"]),
        "p50_ms": int(summary["50.00 percentile latency (ns)"]) / 1e6,
        "p99_ms": int(summary["99.00 percentile latency (ns)"]) / 1e6,
        "refused": served.refused,
        "wrong": served.wrong,
        "queries": sum(own["ok"] + own["late"] for own in seen.outcomes.values()),
        "lanes": round(seen.lanes / max(1, seen.bundles), 3),
        "failed": "",
    }


def main(argv: Sequence[str]) -> None:
    own_flags.parse("loadgen", FLAGS, argv)
    path = own_flags.folder(FLAGS) / "loadgen.json"
    kinds = [read_kind(f"{text}:{FLAGS.latency_ms}") for text in FLAGS.tenants]
    lives, seen = tenants(kinds), Seen()
    keep = {name: FLAGS[name].value for name in ("tenants", "duration", "queries")}
    head = header(own_flags.command("loadgen", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **keep)
    widths = [width for width in (1, 2, 4, 8, 16, 32) if width < 2 * len(lives)]
    most = max(kind.count for kind in kinds)  # room for all, so that no executable is made twice
    with Runtime(policy=POLICIES[FLAGS.policy](), widths=widths, capacity=most, observers=[seen]) as rt:
        move_in(rt, lives)
        seen.clear()
        served = Served(rt, lives)
        with tempfile.TemporaryDirectory() as folder:
            summary = drive(served, 16 * len(lives), Path(folder))
        served.close()
    if served.failures:
        raise RuntimeError(f"{len(served.failures)} requests failed, the first for this reason") from served.failures[0]
    row = row_of(summary, served, seen)
    save_rows(path, head, [row])
    text = report(head, row)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def report(head: dict[str, Any], row: Row) -> str:
    columns = ["policy", "queries a second", "99% within", "result", "p50 ms", "p99 ms", "queries", "refused at first"]
    line = [
        row["policy"],
        f"{row['rate']:g}",
        f"{row['latency_ms']:g} ms",
        " ".join([row["result"], *(f"({name}: no)" for name in row["because"])]),
        f"{row['p50_ms']:.2f}",
        f"{row['p99_ms']:.2f}",
        f"{row['queries']:,}",
        f"{row['refused']:,}",
    ]
    text = [
        "# MLPerf LoadGen, Server scenario",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"Tenants: {', '.join(head['settings']['tenants'])}; {row['lanes']:.2f} requests a bundle on average.",
        table(columns, [line]),
    ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
