"""slo_attainment on the device at hand: its flags, its cells, its report."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging

from coalesce.models import by_name
from experiments.results import device_name, header, load_rows, Row, save_rows, table
from experiments.settings import command, FLAGS, folder, named
from experiments.simulated import chosen, highest, policies_in
from experiments.slo_real import bound_of, Kind, probe, Service, serving, time_alone_ns
from experiments.slo_report import style
from experiments.slo_sweeps import LINE

REAL = ("coalescing", "EDF, one by one", "FIFO, one by one")  # ours, and the same runtime without coalescing
WITHIN = 0.05  # of the rate that is looked for
TRIES = 2  # probes of a rate, of which the better one counts: a hiccup of the host is nobody's policy


def define_flags() -> None:
    flags.DEFINE_list("models", ["mlp"], "real: models of the tenants, one after the other")
    flags.DEFINE_list("fields", [], "real: fields of single models to set, as in gru.hidden=16,gru.steps=400")
    flags.DEFINE_integer("tenants", 16, "real: how many tenants", lower_bound=1)
    flags.DEFINE_float("slo_scale", 5.0, "real: the SLO, in times alone")
    flags.DEFINE_enum("alone", None, ["program", "request"], "real: whose time alone; on a CPU a request's")
    flags.DEFINE_list("cvs", ["1", "4"], "real: coefficients of variation of each tenant's gaps")
    flags.DEFINE_list("loads", ["0.25", "0.5", "1", "2", "4", "8"], "real: rates, in requests per time alone")
    flags.DEFINE_float("probe_s", 5.0, "real: how long a rate is tried")
    flags.DEFINE_list("lanes", ["1", "2", "4", "8", "16", "32"], "real: widths of executables")


def serve_all() -> None:
    logging.set_verbosity(logging.WARNING)
    whose = FLAGS.alone or ("request" if jax.default_backend() == "cpu" else "program")
    widths = [int(width) for width in FLAGS.lanes]
    head = header(
        command("slo_attainment"),
        FLAGS.device_name or device_name(),
        FLAGS.note,
        models=FLAGS.models,
        fields=FLAGS.fields,
        dtype=FLAGS.dtype,
        tenants=FLAGS.tenants,
        slo_scale=FLAGS.slo_scale,
        alone=whose,
        lanes=widths,
        probe_s=FLAGS.probe_s,
    )
    path = folder() / f"slo_attainment_{'_'.join(FLAGS.models)}_{FLAGS.dtype}.json"
    rows = [] if FLAGS.force else load_rows(path, head)
    kinds = kinds_of(rows, whose, widths)
    alone_ns = statistics.mean(kind.alone_ns for kind in kinds)
    loads = [0.0, *(float(load) for load in FLAGS.loads)]  # 0 for the search
    for name in chosen(FLAGS.policies or REAL):
        done = {(row["cv"], row["load"]) for row in rows if row["policy"] == name}
        missing = [(float(cv), load) for cv in FLAGS.cvs for load in loads if (float(cv), load) not in done]
        if not missing:
            continue
        with serving(name, kinds, FLAGS.tenants, widths) as service:
            for cv, load in missing:
                rate = load * 1e9 / alone_ns
                own = probe(service, rate, cv, FLAGS.probe_s, 1) if load else search(service, cv, alone_ns)
                times = {"alone_us": [k.alone_ns / 1e3 for k in kinds], "slo_us": [k.slo_ns / 1e3 for k in kinds]}
                rows.append({"policy": name, "load": load, **own, **times, "bound": bound_of(service)})
                print(rows[-1], file=sys.stderr, flush=True)
                save_rows(path, head, rows)
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(plot(path.with_suffix(".png"), rows))


def kinds_of(rows: Sequence[Row], whose: str, widths: Sequence[int]) -> list[Kind]:
    """Of the models; their times are measured now, unless there are rows that were measured with some."""
    kinds = []
    for i, name in enumerate(FLAGS.models):
        own = [item for item in FLAGS.fields if item.partition(".")[0] == name]
        fields: dict[str, Any] = {}
        for item in own:
            fields |= named(item)[1]
        model = by_name(name, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **fields)
        alone_ns = round(rows[0]["alone_us"][i] * 1e3) if rows else time_alone_ns(model, whose, widths)
        kinds.append(Kind(model, alone_ns, round(FLAGS.slo_scale * alone_ns)))
    return kinds


def search(service: Service, cv: float, alone_ns: float) -> Row:
    """The rate at which 99% of the requests are in time, and what the last good probe saw."""
    best: Row = {"rate": 0.0, "cv": cv, "attainment": None}
    seeds = itertools.count(100)

    def good(rate: float) -> bool:
        nonlocal best
        for _ in range(TRIES):
            row = probe(service, rate, cv, FLAGS.probe_s, next(seeds))
            if row["attainment"] >= LINE:
                best = max(best, row, key=lambda r: r["rate"])
                return True
        return False

    low = high = 0.1 * 1e9 / alone_ns
    while good(high):
        low, high = high, 2 * high
    if high > low:
        highest(good, low, high, WITHIN)
    return best


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    settings, first = head["settings"], rows[0]
    whose = "a request alone in the runtime" if settings["alone"] == "request" else "the jitted program alone"
    slos = [
        f"{name}: {alone_us / 1e3:.3f} ms alone, SLO {slo_us / 1e3:.3f} ms"
        for name, alone_us, slo_us in zip(settings["models"], first["alone_us"], first["slo_us"], strict=True)
    ]
    text = [
        f"# Requests in time: {settings['tenants']} tenants of {', '.join(settings['models'])}, {settings['dtype']}",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        f"The SLO is {settings['slo_scale']:g} times what {whose} takes, from submit to result, for who waits: "
        f"{'; '.join(slos)}. Requests are submitted at the times of Gamma processes, one a tenant, by a thread of the "
        f"same process. A rate is tried for {settings['probe_s']:g} s; the best of {TRIES} tries counts in a search.",
        f"## The rate at which {100 * LINE:.0f}% of the requests are in time",
        search_table([row for row in rows if not row["load"]]),
    ]
    for cv in sorted({row["cv"] for row in rows}):
        own = [row for row in rows if row["load"] and row["cv"] == cv]
        text += [f"## Share in time by rate, CV {cv:g}", rate_table(own)] * bool(own)
    return "\n\n".join(text) + "\n"


def search_table(rows: Sequence[Row]) -> str:
    """Beside each rate how many times that of the same runtime with EDF, one by one."""
    names, lines = policies_in(rows), []
    for cv in sorted({row["cv"] for row in rows}):
        own = {row["policy"]: row for row in rows if row["cv"] == cv}
        edf = own.get(REAL[1], {}).get("rate")
        cells = []
        for name in names:
            rate = own[name]["rate"] if name in own else None
            times = f" ({rate / edf:.1f}x)" if rate and edf else ""
            cells.append("" if rate is None else f"{rate:,.0f}{times}")
        lines.append([f"{cv:g}", *cells, f"{max(row['bound'] for row in own.values()):,.0f}"])
    return table(["CV", *names, "bound"], lines)


def rate_table(rows: Sequence[Row]) -> str:
    names, lines = policies_in(rows), []
    for load in sorted({row["load"] for row in rows}):
        own = {row["policy"]: row for row in rows if row["load"] == load}
        cells = [shown(own[name]) if name in own else "" for name in names]
        lines.append([f"{next(iter(own.values()))['rate']:,.0f}", *cells])
    columns = [f"{name}: in time, p99 ms, lanes a bundle" for name in names]
    return table(["requests a second", *columns], lines)


def shown(row: Row) -> str:
    p99 = f"{row['latency_p99_us'] / 1e3:.2f}" if row["latency_p99_us"] is not None else "-"
    lanes = f"{row['lanes_a_bundle']:.1f}" if row["lanes_a_bundle"] is not None else "-"
    return f"{100 * row['attainment']:.1f}%, {p99}, {lanes}"


def plot(path: Path, rows: Sequence[Row]) -> str:
    """Attainment by rate with the 99% line, a panel for each CV; returns what to print."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    cvs = sorted({row["cv"] for row in rows})
    figure = Figure(figsize=(5.5 * len(cvs), 4), layout="constrained")
    for axes, cv in zip(figure.subplots(1, len(cvs), squeeze=False)[0], cvs, strict=True):
        for name in policies_in(rows):
            own = [row for row in rows if row["load"] and (row["cv"], row["policy"]) == (cv, name)]
            points = sorted((row["rate"], 100 * row["attainment"]) for row in own)
            axes.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name, **style(name))
        axes.axhline(100 * LINE, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=f"CV {cv:g}", xlabel="requests a second", ylabel="% in time", xscale="log", ylim=(0, 102))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return f"plot: {path}"
