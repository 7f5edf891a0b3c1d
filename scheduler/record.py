"""Decisions as text, one a line, so that a log can be kept, read and replayed (`replay`).

    {"ns":5,"event":["Submitted",[[0,"a",0,5,105,0]]],"commands":[["Dispatch",0,1,[[0]],10,10,"deadline"]]}

An event or a command is its name and then its fields, in their order; a reason is the name of its kind, a mapping a
list of pairs. `load(dump(*decision)) == decision`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.commands import Command, Dispatch, Quarantine, Readmit, Reason, Reject, WakeAt, Want
from coalesce.scheduler.events import (
    Cancelled,
    CatalogChanged,
    Closed,
    Completed,
    Event,
    Submitted,
    TenantAdded,
    TenantRemoved,
    Timer,
)
from coalesce.scheduler.request import Request, Tenant
from coalesce.scheduler.run import Decision


def dump(event: Event, now_ns: int, commands: Sequence[Command]) -> str:
    line = {"ns": now_ns, "event": plain(event), "commands": [plain(command) for command in commands]}
    return json.dumps(line, separators=(",", ":"), ensure_ascii=False)


def load(line: str) -> Decision:
    """Raises ValueError where a line is none of a log."""
    try:
        read = json.loads(line)
        commands = tuple(built(command) for command in read["commands"])
        return Decision(built(read["event"]), read["ns"], commands)
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"no decision: {line[:80]!r} ({e}); a log has one a line, written by record.dump") from e


def save(log: Iterable[Decision]) -> Iterator[str]:
    """Lines, for `file.writelines`."""
    return (dump(*decision) + "\n" for decision in log)


def read(lines: Iterable[str]) -> Iterator[Decision]:
    """Of a file that is open, or of any lines."""
    return (load(line) for line in lines if line.strip())


def plain(value: Event | Command) -> list[Any]:
    if isinstance(value, CatalogChanged):
        catalog = value.catalog
        return ["CatalogChanged", catalog.executables, pairs(catalog.segments), pairs(catalog.slots)]
    if isinstance(value, Reject):
        return ["Reject", value.request, value.reason.name]
    return [type(value).__name__, *value]


def pairs(mapping: Mapping[int, int] | None) -> list[tuple[int, int]] | None:
    return None if mapping is None else list(mapping.items())


def built(value: list[Any]) -> Any:
    kind, *fields = value
    return BUILDERS[kind](*fields)


def build_catalog(executables: list[Any], segments: list[Any] | None, slots: list[Any] | None) -> CatalogChanged:
    made = tuple(Executable(id, entries_of(entries), *rest) for id, entries, *rest in executables)
    return CatalogChanged(Catalog(made, *(None if m is None else {k: v for k, v in m} for m in (segments, slots))))


def build_tenant(fields: list[Any]) -> TenantAdded:
    name, families, *rest = fields
    return TenantAdded(Tenant(name, tuple(families), *rest))


def build_dispatch(bundle: int, executable: int, lanes: list[list[int]], *rest: Any) -> Dispatch:
    return Dispatch(bundle, executable, tuple(map(tuple, lanes)), *rest)


def entries_of(entries: list[list[int]]) -> tuple[Entry, ...]:
    return tuple(Entry(*entry) for entry in entries)


BUILDERS: Mapping[str, Callable[..., Event | Command]] = {
    "Submitted": lambda requests: Submitted(tuple(Request(*request) for request in requests)),
    "Cancelled": Cancelled,
    "Completed": Completed,
    "TenantAdded": build_tenant,
    "TenantRemoved": TenantRemoved,
    "CatalogChanged": build_catalog,
    "Timer": Timer,
    "Closed": Closed,
    "Dispatch": build_dispatch,
    "Reject": lambda request, reason: Reject(request, Reason[reason]),
    "WakeAt": WakeAt,
    "Want": lambda entries: Want(entries_of(entries)),
    "Quarantine": Quarantine,
    "Readmit": Readmit,
}
