"""Logs as text, and told again to a fresh policy."""

import io
from random import Random

import pytest

from coalesce.scheduler import record
from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, Quarantine, Readmit, Reason, Reject, WakeAt, Want
from coalesce.scheduler.events import (
    Cancelled,
    CatalogChanged,
    Closed,
    Completed,
    Submitted,
    TenantAdded,
    TenantRemoved,
    Timer,
)
from coalesce.scheduler.machine import Compiler, Line, line_catalog, line_times
from coalesce.scheduler.replay import replay
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Run
from coalesce.scheduler.simulator import simulate
from coalesce.scheduler.workloads import arrive, poisson

pytestmark = pytest.mark.once

EXECUTABLE = Executable(3, (Entry(0, 0, 2), Entry(1, 2, 1)), 10, 20, 4096)
EVENTS = [
    Submitted((Request(0, "ä b", 0, 5, 105), Request(1, 'c"', 1, 5, -9, 2))),
    Cancelled(0),
    Completed(4, 10, 20, failed=True),
    Completed(5, 20, 40, False, 8, True, 3, 25),
    TenantAdded(Tenant("ä b", (0, 4), 100, -1, 0.1, 7)),
    TenantRemoved("ä b", drain=False),
    CatalogChanged(Catalog()),
    CatalogChanged(Catalog((EXECUTABLE,), {0: 3, 1: 3}, {0: 16})),
    Timer(),
    Closed(drain=True),
]
COMMANDS = [
    Dispatch(4, 3, ((0, 1), (2,)), 10, 20, "deadline"),
    *(Reject(number, reason) for number, reason in enumerate(Reason)),
    WakeAt(1 << 60),
    Want((Entry(0, 0, 4),)),
    Quarantine("ä b"),
    Quarantine("ä b", failed=True),
    Readmit("ä b"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_what_is_written_is_read_again(event):
    for commands in (), tuple(COMMANDS):
        line = record.dump(event, 17, commands)
        assert "\n" not in line
        assert record.load(line) == (event, 17, commands)


def test_a_line_reads_as_the_docstring_shows():
    line = record.dump(
        Submitted((Request(0, "a", 0, 5, 105),)),
        5,
        [Dispatch(0, 1, ((0,),), 10, 10, "deadline"), Reject(1, Reason.FAILED)],
    )
    assert line == (
        '{"ns":5,"event":["Submitted",[[0,"a",0,5,105,0]]],'
        '"commands":[["Dispatch",0,1,[[0]],10,10,"deadline"],["Reject",1,"FAILED"]]}'
    )


def test_what_was_written_before_there_was_a_reason_is_read_too():
    line = '{"ns":5,"event":["Timer"],"commands":[["Quarantine","a"]]}'
    assert record.load(line) == (Timer(), 5, (Quarantine("a"),))


@pytest.mark.parametrize("line", ["", "{", "[]", '{"ns":5}', '{"ns":5,"event":["Nothing"],"commands":[]}'])
def test_what_is_no_decision_is_refused(line):
    with pytest.raises(ValueError, match="no decision"):
        record.load(line)


def recorded() -> Run:
    lines = {0: Line(50_000, 1_000_000), 1: Line(100_000, 500_000)}
    rng = Random(3)
    arrivals = arrive(rng, poisson(rng, 6000.0), ["a", "b", "c"], 60_000_000)
    tenants = [Tenant("a", (0,), 20_000_000), Tenant("b", (1,), 10_000_000), Tenant("c", (0,), 30_000_000, 1)]
    return simulate(
        Coalescing(),
        tenants,
        line_catalog(lines, (1, 2, 4), segments=2, spread=1.3, slots=16),
        arrivals,
        happenings=[(30_000_000, Cancelled(3)), (50_000_000, Cancelled(290))],
        compiler=Compiler(lambda entries: line_times(lines, entries, 2, 1.3), 20_000_000),
        keep_log=True,
    )


def test_a_saved_log_is_answered_alike_by_a_fresh_policy():
    log, file = recorded().log, io.StringIO()
    file.writelines(record.save(log))
    file.seek(0)
    saved = list(record.read(file))
    assert [(e, at, tuple(commands)) for e, at, commands in log] == saved
    assert replay(saved, Coalescing()) is None
    assert any(isinstance(d.event, CatalogChanged) for d in saved[4:])


def test_the_first_decision_that_differs_is_found():
    log = recorded().log
    found = replay(log, Coalescing(depth=1))
    assert found is not None and replay(log[: found.number], Coalescing(depth=1)) is None
    assert str(found).startswith(f"decision {found.number}, at {found.recorded.now_ns}: ")
