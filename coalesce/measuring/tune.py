"""`tune`: measure the candidates for every pack of some programs and keep what was found, case by case.

What the database knows already is skipped, and the file is written after each case: an interrupted run goes on where it
was. With workers, processes compile the candidates of different cases at once, and take turns at timing them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed, ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax

from coalesce.bank import default_device
from coalesce.errors import TuningError
from coalesce.kernels.mosaic import on_hopper
from coalesce.measuring.case import Case, cases_in, plan_of
from coalesce.measuring.chain_case import ChainCase, chains_in
from coalesce.measuring.measure import entry_of, measure, on_a_gpu, rounded, Times, worth_trying
from coalesce.program import Program
from coalesce.tuning import Database, Entry, load, packaged, save, Tuned, user_file
from coalesce.tuning.candidates import Candidate
from coalesce.tuning.show import op_name, rivals

Source = Callable[[], Sequence[Program]]  # with workers: hashable, and picklable


class Task(NamedTuple):
    """A case to measure, by its number."""

    case: int
    kernels: tuple[str, ...]
    company: bool
    known: Times | None  # what its candidates took alone
    usual: Candidate | None = None  # what is measured beside some kernels: the best of a few may be worse


class Measured(NamedTuple):
    alone: Times
    company: Times


Results = Iterator[tuple[int, Measured | str]]


def on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tune(
    source: Source,
    out: Path,
    *,
    workers: int = 0,
    seconds: float = math.inf,
    force: bool = False,
    kernels: Sequence[str] = (),
    company: bool = False,
    say: Callable[[str], None] = on_stderr,
) -> Database:
    """The database of the file `out`, with entries for what the programs of `source` run on the default device.

    Args:
      workers: processes that compile; 0: all in this one.
      seconds: no case is begun after so many.
      force: measure again what is known.
      kernels: measure only these of the candidates, and what runs a case by the same database without that; all, if
        none are given.
      company: also measure the best of them beside another launch, where that is not known.

    Raises:
      TuningError: the file is no database or cannot be written; or there is no GPU, without which nothing has company.
    """
    if company and not on_a_gpu():
        raise TuningError("kernels run beside another on a GPU alone; leave --company out")
    start = time.time()
    database = at(out)
    # What is packaged stands behind the user's own file, and behind no other.
    known = (database.over(packaged()) if out == user_file() else database).entries
    everything = cases_of(source)
    found = {i: None if force else known.get(case.key) for i, case in enumerate(everything)}
    tuned, platform = Tuned(Database(known), default_device().device_kind), jax.default_backend()
    todo = [
        Task(
            i,
            tuple(kernels),
            company,
            {**entry.tried} if entry else None,
            everything[i].usual(tuned, platform) if kernels else None,
        )
        for i, entry in found.items()
        if entry is None or (company and not entry.company)
    ]
    say(f"{len(everything)} cases on {default_device().device_kind}, {len(everything) - len(todo)} of them known")
    results = at_once if workers else in_turn
    for done, (i, times) in enumerate(results(source, todo, start + seconds, workers), start=1):
        case = everything[i]
        left = (time.time() - start) / done * (len(todo) - done)
        where = f"{done}/{len(todo)}, {left / 60:.0f} min left"
        if isinstance(times, str) or (entry := found[i] or entry_of(case, times.alone)) is None:
            say(f"[{where}] {case_name(case)}: {times if isinstance(times, str) else 'no candidate ran'}")
            continue
        entry = replace(entry, company=rounded(times.company))
        database = at(out).with_entry(case.key, entry)  # another run may have written meanwhile
        save(database, out)
        say(f"[{where}] {line(case, entry)}")
    return database


def at(path: Path) -> Database:
    return load(path) if path.exists() else Database()


def line(case: Case | ChainCase, entry: Entry) -> str:
    ran = sum(us is not None for us in entry.tried.values())
    best, other = rivals(entry)
    return f"{case_name(case)}: {best}, then {other or 'nothing'} ({ran} of {len(entry.tried)} ran)"


def case_name(case: Case | ChainCase) -> str:
    return f"{case.times} x {op_name(case.key)} x{case.key.width}"


@cache  # for this process; those that measure are given a case by its number
def cases_of(source: Source) -> list[Case | ChainCase]:
    bundle, device = plan_of(source()), default_device().device_kind
    return [*cases_in(bundle, device), *(chains_in(bundle, device) if on_a_gpu() else ())]


def candidate_times(source: Source, task: Task, lock: Any = None) -> Measured | str:
    """What the candidates of a case took, or why they could not be measured."""
    case = cases_of(source)[task.case]
    platform, hopper = jax.default_backend(), on_hopper(default_device())
    everything = case.candidates(platform, hopper)
    tried = [one for one in everything if not task.kernels or one[0] in task.kernels]
    if not tried:
        return f"not measured: {', '.join(task.kernels)} cannot run it"
    if task.usual is not None and task.usual not in tried:
        tried.append(task.usual)
    alone = task.known
    try:
        alone = measure(case, tried, lock) if alone is None else alone
        few = worth_trying(alone) if task.company else []
        return Measured(alone, measure(case, few, lock, beside=True) if few else {})
    except (jax.errors.JaxRuntimeError, TuningError) as e:  # such as: operands that memory does not hold
        if alone is None or alone is task.known:
            return f"not measured: {str(e).splitlines()[0]}"
        return Measured(alone, {})  # memory did not hold them twice; those alone are kept


def in_turn(source: Source, todo: Sequence[Task], until: float, workers: int) -> Results:
    for task in todo:
        if time.time() > until:
            return
        yield task.case, candidate_times(source, task)


def at_once(source: Source, todo: Sequence[Task], until: float, workers: int) -> Results:
    context = get_context("spawn")  # what has touched a GPU must not fork
    # A process for each case: one keeps the memory of the device that it had, and VGG-16 has 3 GB in several layouts.
    with context.Manager() as manager, ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        lock = manager.Lock()
        begun = {pool.submit(unless_late, source, task, until, lock): task.case for task in todo}
        try:
            for future in as_completed(begun):
                if not future.cancelled() and (times := future.result()) is not None:
                    yield begun[future], times
                if time.time() > until:  # not a process for each case that is left
                    for waiting in begun:
                        waiting.cancel()
        finally:
            pool.shutdown(cancel_futures=True)  # what waits; an interrupt ends what runs


def unless_late(source: Source, task: Task, until: float, lock: Any) -> Measured | str | None:
    return candidate_times(source, task, lock) if time.time() <= until else None
