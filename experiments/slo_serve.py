"""slo_attainment on the device at hand: its flags, its cells, and who serves them.

All policies of the runtime share one runtime, with executables that are made once, but for the one that thinks
elsewhere, which has a runtime beside it; torch_edf comes after them, where it runs. At `--rates` nothing is searched
for: policies take turns (experiments/slo_turns.py), with one SLO for all. What is there is not measured again, and a
search that ran out of --budget_s goes on from what it knew.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, ExitStack
from dataclasses import asdict
from typing import Any

import jax
from absl import app, flags, logging

from coalesce.models import by_name, NAMES
from coalesce.serving.gather import is_worth_it
from experiments import slo_torch
from experiments.list_flags import define_counts, define_fields_of_models, define_names, define_numbers
from experiments.peers_common import CannotRun
from experiments.results import device_name, header, load_rows, Row
from experiments.settings import command, FLAGS, folder, named, tolerance
from experiments.simulated import POLICIES
from experiments.slo_probe import Bracket, LINE, OutOfTime, probe, search, Served
from experiments.slo_real import ELSEWHERE, is_single, Kind, Owned, owners, Service, serving, START_S, time_alone_ns
from experiments.slo_real_report import plot, report
from experiments.slo_sheet import Cell, Sheet
from experiments.slo_turns import SEED, take_turns

REAL = ("coalescing", "EDF, one by one", "FIFO, one by one")  # ours, and the same runtime without coalescing
OURS = (*REAL, ELSEWHERE)
SHORT: dict[str, str] = dict(zip(("coalescing", "edf", "fifo", "elsewhere"), OURS, strict=True))
ALL = (*POLICIES, ELSEWHERE, slo_torch.NAME)
flags.disclaim_key_flags()  # they are the script's, whose --help lists them
FIRST = 0.9  # of what seems possible: the rate that a search tries first


def define_flags() -> None:
    define_names("models", ["mlp"], "real: models of the tenants, one after the other", NAMES)
    define_fields_of_models("fields", "real: fields of single models to set, as in gru.hidden=16,gru.steps=400")
    flags.DEFINE_integer("tenants", 16, "real: how many tenants", lower_bound=1)
    flags.DEFINE_float("slo_scale", 5.0, "real: the SLO, in times alone")
    flags.DEFINE_enum("alone", None, ["program", "request"], "real: whose time alone; on a CPU a request's")
    define_numbers(
        "cvs", [1, 4], "real: coefficients of variation of each tenant's gaps", good=lambda cv: cv >= 0, wanted="from 0"
    )
    define_numbers("overloads", [2], "real: multiples of each policy's own rate")
    define_numbers("loads", [0.25, 0.5, 1, 2, 4, 8], "real: rates, in requests per time alone")
    define_numbers("rates", [], "real: requests a second at which policies take turns, instead of all else")
    flags.DEFINE_float("probe_s", 5.0, "real: how long a rate is tried")
    flags.DEFINE_integer(
        "tries", 2, "real: of a rate; in a search the best counts, since a hiccup of the host is nobody's policy"
    )
    flags.DEFINE_float("within", 0.05, "real: how near a search comes to the rate, as a share of it")
    flags.DEFINE_integer("segments", None, "real: that programs are cut into; as cost and SLOs ask for if not given")
    flags.DEFINE_bool("mixed", True, "real: make executables of several families while others are served")
    define_counts("lanes", [1, 2, 4, 8, 16, 32], "real: widths of executables")


def cells(policies: Sequence[str]) -> list[Cell]:
    """What matters most comes first."""
    kinds = {"search": [0.0], "overload": FLAGS.overloads, "load": FLAGS.loads}
    if FLAGS.rates:
        kinds = {"rate": FLAGS.rates}
    return [
        Cell(name, cv, kind, value)
        for kind, values in kinds.items()
        for name in policies
        for cv in FLAGS.cvs
        for value in values
    ]


def serve_all() -> None:
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs the device's memory too
    policies, begun_s = named_policies(FLAGS.policies), time.monotonic()
    whose = FLAGS.alone or ("request" if jax.default_backend() == "cpu" else "program")
    widths = FLAGS.lanes
    head = header(
        command("slo_attainment", "policies", "budget_s"),
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
        tries=FLAGS.tries,
        within=FLAGS.within,
        **({} if FLAGS.segments is None else {"segments": FLAGS.segments}),
        **({} if FLAGS.mixed else {"mixed": False}),
        **({} if jax.default_backend() == "cpu" else {"gathers": is_worth_it()}),
    )
    name = "slo_rates" if FLAGS.rates else "slo_attainment"
    path = folder() / f"{name}_{'_'.join(FLAGS.models)}_{FLAGS.dtype}.json"
    sheet = Sheet(path, head, FLAGS.budget_s, begun_s)
    sheet.rows = [] if FLAGS.force else load_rows(path, head)
    jax.monitoring.register_event_duration_secs_listener(sheet.count)
    why = ""
    try:
        why = fill(sheet, policies, kinds_of(sheet.rows, whose), widths)
    except (OutOfTime, TimeoutError):
        print(f"the budget of {FLAGS.budget_s:g} s is spent; the same command goes on from here", file=sys.stderr)
    if sheet.rows:
        text = report(head, sheet.rows, why)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
        print(plot(path.with_suffix(".png"), sheet.rows))


def named_policies(given: Sequence[str] | None) -> list[str]:
    wanted = {SHORT.get(name, name) for name in given or (*REAL, slo_torch.NAME)}
    if unknown := wanted - set(ALL):
        raise app.UsageError(f"there is no policy {sorted(unknown)[0]!r}; there are {', '.join((*SHORT, *ALL))}")
    return [name for name in ALL if name in wanted]


def kinds_of(rows: Sequence[Row], whose: str) -> list[Kind]:
    """Of the models; their times are measured now, unless there are rows that were measured with some."""
    kinds = []
    for i, name in enumerate(FLAGS.models):
        fields: dict[str, Any] = {}
        for item in FLAGS.fields:
            fields |= named(item)[1] if item.partition(".")[0] == name else {}
        model = by_name(name, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **fields)
        alone_ns = round(rows[0]["alone_us"][i] * 1e3) if rows else time_alone_ns(name, model, whose)
        kinds.append(Kind(name, fields, model, alone_ns, round(FLAGS.slo_scale * alone_ns)))
    return kinds


def fill(sheet: Sheet, policies: Sequence[str], kinds: Sequence[Kind], widths: Sequence[int]) -> str:
    """Measures what is missing; returns why a policy does not run here, if one does not."""
    ours, peer = (
        sheet.missing(cells([name for name in policies if (name == slo_torch.NAME) == is_peer]))
        for is_peer in (False, True)
    )
    if not ours and not peer:
        return ""
    sheet.check_time()
    owned = owners(kinds, FLAGS.tenants)
    times = {"alone_us": [k.alone_ns / 1e3 for k in kinds], "slo_us": [k.slo_ns / 1e3 for k in kinds]}
    sheet.say(f"tenants are drawn; {times}")
    if ours:
        only_single = all(is_single(cell.policy) for cell in ours)
        with runtimes(sheet, owned, widths[:1] if only_single else widths, ours) as services:
            measure_ours(sheet, ours, services, widths, times)
    if not peer:
        return ""
    try:
        with slo_torch.queue_of(owned, FLAGS.precision, tolerance()) as (queued, chosen):
            sheet.say(f"{slo_torch.NAME}: {chosen}")
            facts = {**times, "depth": chosen.depth, "depths": chosen.a_second}
            if FLAGS.rates:
                take_turns(sheet, peer, lambda cell: queued, facts, FLAGS.probe_s, FLAGS.tries)
                return ""
            for cell in peer:
                measure(sheet, cell, queued, max(chosen.a_second.values()), facts)
    except CannotRun as e:
        return str(e)
    return ""


@contextmanager
def runtimes(
    sheet: Sheet, owned: Sequence[Owned], widths: Sequence[int], cells: Sequence[Cell]
) -> Iterator[dict[str, Service]]:
    """Who serves, by policy. All are there before the first request, which ends the choice of kernels by time."""
    with ExitStack() as stack:
        made: dict[bool, Service] = {}
        for elsewhere in sorted({cell.policy == ELSEWHERE for cell in cells}):
            start_s = min(START_S, sheet.left_s)
            with_it = serving(owned, widths, start_s, FLAGS.segments, FLAGS.mixed, elsewhere)
            service = made[elsewhere] = stack.enter_context(with_it)
            ready = service.runtime.health().executables
            where = " elsewhere" if elsewhere else ""
            sheet.say(f"{ready} executables are ready{where}: {service.offered.times()} ns")
        yield {cell.policy: made[cell.policy == ELSEWHERE] for cell in cells}


def measure_ours(
    sheet: Sheet, cells: Sequence[Cell], services: Mapping[str, Service], widths: Sequence[int], times: Row
) -> None:
    def served_by(cell: Cell) -> Service:
        service = services[cell.policy]
        service.policy = cell.policy
        return service

    if FLAGS.rates:
        take_turns(sheet, cells, served_by, times, FLAGS.probe_s, FLAGS.tries)
        return
    for cell in cells:
        service = served_by(cell)
        most = widths[0] if is_single(cell.policy) else None
        measure(sheet, cell, service, service.bound(most), {**times, "bound": service.bound()})


def measure(sheet: Sheet, cell: Cell, served: Served, possible: float, facts: Row) -> None:
    sheet.check_time(FLAGS.probe_s)
    if cell.kind == "search":
        look(sheet, cell, served, possible, facts)
        return
    rate = cell.value * 1e9 / (1e3 * statistics.mean(facts["alone_us"]))
    if cell.kind == "overload":
        found = sheet.find(Cell(cell.policy, cell.cv, "search"))
        if found is None or found.get("unfinished") or not found["rate"]:
            return
        rate = cell.value * found["rate"]
    sheet.add(cell, {**probe(served, rate, cell.cv, FLAGS.probe_s, SEED), **facts})


def look(sheet: Sheet, cell: Cell, served: Served, possible: float, facts: Row) -> None:
    """For the rate at which 99% of the requests are in time, from where an earlier run had to stop."""
    found = Bracket(**(sheet.find(cell) or {}).get("bracket", {}))

    def tried(rate: float) -> Row | None:
        for i in range(FLAGS.tries):
            sheet.check_time(FLAGS.probe_s)
            row = probe(served, rate, cell.cv, FLAGS.probe_s, SEED + i, patient=False)
            if row["attainment"] >= LINE:
                return row
        return None

    try:
        search(tried, FIRST * possible, FLAGS.within, found)
    except OutOfTime:
        sheet.add(cell, {"unfinished": True, "bracket": asdict(found), "rate": found.low, **facts})
        raise
    best = found.best or {"rate": 0.0, "pace": 1.0, "attainment": None}
    sheet.add(cell, {**best, "rate": best["rate"] * min(1.0, best["pace"]), **facts})
