"""Claim: small programs of different families that wait for each other are served faster by one executable of both.

    python -m experiments.mixed_family
    python -m experiments.mixed_family "--kinds=mlp.width=16:4,mlp.width=32;layers=16:4"

Tenants of different families, each with one request under way at any time. Served by the runtime twice:

    apart    the policy's wishes for executables of several families are not heard
    mixed    they are: what is measured to take less than the families one after another is offered, and dispatched
             where the policy has it

The rows say how many bundles ran in such executables, and what these take against what they stand for.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from absl import flags

from coalesce.runtime.runtime import Runtime
from coalesce.scheduler.catalog import Catalog, Entry, text_of
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Command, Dispatch
from coalesce.scheduler.events import Event
from experiments import own_flags
from experiments.isolation import closed_loop
from experiments.list_flags import define_counts, define_names
from experiments.live import Kind, Live, move_in, quantile_ms, read_kind, Seen, tenants
from experiments.results import device_name, header, Row, save_rows, table
from experiments.switching import Switching

METHODS = ("apart", "mixed")
ENDING = ": it is done without"
PATIENT_S = 60.0  # nobody is refused
MADE_S = 300.0  # what is wanted is waited for

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_list(
    "kinds",
    [f"mlp.width={width};layers=4:1" for width in (16, 24, 32, 40)],
    "MODEL[.FIELD=VALUE;...]:COUNT",
    flag_values=FLAGS,
)
define_counts("widths", [1, 2, 4], "of executables", flag_values=FLAGS)
define_names("methods", list(METHODS), "which methods", METHODS, flag_values=FLAGS)
flags.DEFINE_float("duration", 10.0, "seconds of each run", lower_bound=0.05, flag_values=FLAGS)
flags.DEFINE_integer("repeats", 5, "runs of each method, in turns", lower_bound=1, flag_values=FLAGS)


class Counted(Seen):
    """Also which bundles ran in executables of several families."""

    def clear(self) -> None:
        super().clear()
        self.dispatches: Counter[int] = Counter()  # by executable

    def decided(self, event: Event, now_ns: int, commands: Sequence[Command]) -> None:
        super().decided(event, now_ns, commands)
        self.dispatches.update(c.executable for c in commands if isinstance(c, Dispatch))


class DoneWithout(logging.Handler):
    """What the runtime says of executables that take no less than their families one after another."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.endswith(ENDING):
            self.said.append(message.removesuffix(ENDING))


class Served:
    """A runtime under one method, with its tenants, for as many runs as are wanted."""

    def __init__(self, method: str, kinds: Sequence[Kind]) -> None:
        self.method, self.seen = method, Counted()
        self.lives: list[Live] = tenants(kinds)
        policy = Switching(Coalescing, mixed=method == "mixed")
        self.rt = Runtime(policy=policy, widths=FLAGS.widths, observers=[self.seen])
        move_in(self.rt, self.lives)
        for _ in range(6):  # whoever waits for whom is seen, and what is wanted for them is made
            closed_loop(self.rt, self.lives, min(1.0, FLAGS.duration))
            self.rt.warm_up(MADE_S)

    def run(self, number: int) -> Row:
        seen = self.seen
        seen.clear()
        begin = time.monotonic()
        closed_loop(self.rt, self.lives, FLAGS.duration)
        took_s = time.monotonic() - begin
        self.rt.drain(PATIENT_S)
        every = [ns for own in seen.latencies_ns.values() for ns in own]
        mixed = {e.id for e in seen.catalog.mixed}
        return {
            "method": self.method,
            "run": number,
            "requests": len(every),
            "requests_per_s": round(len(every) / took_s, 1),
            "p50_ms": round(quantile_ms(every, 0.5), 4),
            "p99_ms": round(quantile_ms(every, 0.99), 4),
            "bundles": sum(seen.dispatches.values()),
            "mixed_bundles": sum(count for number, count in seen.dispatches.items() if number in mixed),
            "mixed_executables": executables_of(seen.catalog),
        }


def executables_of(catalog: Catalog) -> list[dict[str, Any]]:
    """Those of several families, with what they take and what their entries take one after another."""

    def alone_us(entry: Entry) -> float:
        own = catalog.by_place.get(entry[:2], ())
        return next((e.l50_ns / 1e3 for e in own if e.entries[0].width == entry.width), float("nan"))

    return [
        {
            "entries": text_of(e.entries),
            "us": round(e.l50_ns / 1e3, 1),
            "apart_us": round(sum(map(alone_us, e.entries)), 1),
        }
        for e in catalog.mixed
    ]


def report(head: dict[str, Any], rows: Sequence[Row], without: Sequence[str] = ()) -> str:
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["requests_per_s"])
        row = own[len(own) // 2]
        share = row["mixed_bundles"] / row["bundles"] if row["bundles"] else 0.0
        spread = f"{own[0]['requests_per_s']:,.0f} to {own[-1]['requests_per_s']:,.0f}"
        lines.append([
            method, f"{row['requests_per_s']:,.0f}", spread, f"{row['p50_ms']:.3f}", f"{row['p99_ms']:.3f}",
            f"{row['bundles']:,}", f"{row['mixed_bundles']:,} ({share:.0%})",
        ])  # fmt: skip
    made = [row for row in rows if row["mixed_executables"]]
    offered = made[-1]["mixed_executables"] if made else []
    settings = head["settings"]
    text = [
        f"# Families that share executables: {', '.join(settings['kinds'])}",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"The median of {settings['repeats']} runs of {settings['duration_s']:g} s by requests a second, and the "
        "range.",
        table(["method", "requests/s", "range", "p50 ms", "p99 ms", "bundles", "of several families"], lines),
        "Executables of several families that were offered, in microseconds:",
        table(
            ["executable", "together", "apart"],
            [[e["entries"], f"{e['us']:.0f}", f"{e['apart_us']:.0f}"] for e in offered] or [["none", "", ""]],
        ),
    ]
    if without:
        text += ["Made, measured and not offered:", "\n".join(f"- {what}" for what in without)]
    return "\n\n".join(text) + "\n"


def main(argv: Sequence[str]) -> None:
    own_flags.parse("mixed_family", FLAGS, argv)
    settings = {"kinds": FLAGS.kinds, "duration_s": FLAGS.duration, "repeats": FLAGS.repeats}
    head = header(own_flags.command("mixed_family", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **settings)
    path, rows = own_flags.folder(FLAGS) / "mixed_family.json", list[Row]()
    kinds = [read_kind(f"{text}:{1e3 * PATIENT_S:g}") for text in FLAGS.kinds]
    log, without = logging.getLogger("coalesce.runtime"), DoneWithout()
    level = log.level
    log.addHandler(without)
    log.setLevel(logging.INFO)
    served = [Served(method, kinds) for method in FLAGS.methods]
    for number in range(FLAGS.repeats):
        for own in served:
            print(f"{own.method}, run {number + 1} of {FLAGS.repeats}", file=sys.stderr, flush=True)
            rows.append(own.run(number))
            save_rows(path, head, rows)
            path.with_suffix(".md").write_text(report(head, rows, without.said), encoding="utf-8")
    for own in served:
        own.rt.close()
    log.removeHandler(without)
    log.setLevel(level)
    print(report(head, rows, without.said))


if __name__ == "__main__":
    main(sys.argv[1:])
