"""A database as a table."""

from __future__ import annotations

import re

from coalesce.kernels import VERSION
from coalesce.tuning.database import Database
from coalesce.tuning.entry import candidate_name, Entry, Key

PARAMETERS = re.compile(r" \[[^\]]*\]")  # shapes follow their dtype without a space
HEADER = ("op", "dtype", "width", "kernel", "blocks", "us", "next best", "best beside another", "device")


def table(database: Database) -> str:
    rows = [HEADER, *(cells(key, database.entries[key]) for key in sorted(database.entries))]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(map(str.ljust, row, sizes)).rstrip() for row in rows)


def cells(key: Key, entry: Entry) -> tuple[str, ...]:
    width = str(key.width) + (f", {key.rows} lanes each" if key.rows > 1 else "")
    device = key.device + ("" if key.version == VERSION else f", not used: of kernels {key.version}, not {VERSION}")
    blocks = str(entry.blocks) if entry.blocks else ""
    us, company = f"{entry.us:.1f}", in_company(entry)
    return op_name(key), dtype(key), width, entry.kernel, blocks, us, rivals(entry)[1], company, device


def dtype(key: Key) -> str:
    """Of the left operand."""
    return key.op.split(" ")[1].split("[")[0]


def op_name(key: Key) -> str:
    """An op, or those of a chain, without parameters, and without the dtype that operands share."""
    return PARAMETERS.sub("", key.op).replace(f" {dtype(key)}[", " [")


def rivals(entry: Entry) -> tuple[str, str]:
    """The winner, and the fastest of other kernels, or else of other blocks; "" if nothing else ran."""
    best = candidate_name(entry.kernel, entry.blocks)
    others = [(us, name) for name, us in entry.tried.items() if us is not None and name != best]
    others = [other for other in others if other[1].split(" ")[0] != entry.kernel] or others
    return text(best, entry.us), text(min(others)[1], min(others)[0]) if others else ""


def in_company(entry: Entry) -> str:
    """The fastest beside another launch, and what the winner takes there if that is more; "" if none ran so."""
    ran = {name: us for name, us in entry.company.items() if us is not None}
    if not ran:
        return ""
    us, best = min((us, name) for name, us in ran.items())
    own = ran.get(candidate_name(entry.kernel, entry.blocks), us)
    return text(best, us) + (f" ({own:.1f} by the winner)" if own > us else "")


def text(name: str, us: float) -> str:
    return f"{name} {us:.1f} us"
