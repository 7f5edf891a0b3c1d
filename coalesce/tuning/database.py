"""Entries in a file: JSON, one entry a line in the order of their keys, so that a change of one is a change of a line.

    {"format": 1, "entries": [
    {"device": "NVIDIA H200", "version": 1, "op": "dot ...", "width": 16, "rows": 1, "kernel": "indexed_gemm", ...}
    ]}

Coalesce brings entries along (tuned.json beside this file); those of the user's own file go before them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from coalesce.errors import TuningError
from coalesce.tuning.entry import blocks_of, Entry, Key, named

FORMAT = 1
PACKAGED = Path(__file__).parent / "tuned.json"


@dataclass(frozen=True)
class Database:
    entries: Mapping[Key, Entry] = field(default_factory=dict)

    def with_entry(self, key: Key, entry: Entry) -> Database:
        return Database({**self.entries, key: entry})

    def over(self, others: Database) -> Database:
        """Both, and for a key of both this one's entry."""
        return Database({**others.entries, **self.entries})

    def __str__(self) -> str:
        """The text of its file."""
        lines = ",\n".join(json.dumps(row(key, self.entries[key])) for key in sorted(self.entries))
        return f'{{"format": {FORMAT}, "entries": [\n{lines}\n]}}\n'


def user_file() -> Path | None:
    """$COALESCE_TUNED, or ~/.cache/coalesce/tuned.json; None where nobody is at home."""
    if given := os.environ.get("COALESCE_TUNED"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "coalesce" / "tuned.json"
    except RuntimeError:
        return None


def known() -> Database:
    """What the user measured, if anything yet, over what Coalesce brings along.

    Raises TuningError if the user's own file is no database.
    """
    own = user_file()
    try:
        there = own is not None and own.exists()
    except OSError:  # a home that is somebody else's
        there = False
    return load(own).over(packaged()) if own and there else packaged()


@cache
def packaged() -> Database:
    return load(PACKAGED)


def load(path: Path) -> Database:
    """Raises TuningError if there is no such file, or it is no database of this format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise TuningError(
            f"{path} cannot be read: {e.strerror}; python -m coalesce tune --out {path} makes it"
        ) from None
    except OSError as e:
        raise TuningError(f"{path} cannot be read: {e.strerror}; name another file") from None
    except ValueError as e:
        raise TuningError(f"{path} is no tuning database ({e}); remove it, or restore it, and tune again") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise TuningError(
            f"{path} has format {found}, and this version of Coalesce reads format {FORMAT}; tune into another file"
        )
    try:
        return Database(dict(map(entry_of, data["entries"])))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise TuningError(
            f"{path} has an entry that is none ({type(e).__name__}: {e}); remove its line, or the file, and tune again"
        ) from None


def save(database: Database, path: Path) -> None:
    """Write it beside the file and rename, so that whoever reads or interrupts sees the old or the new one."""
    written = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(str(database), encoding="utf-8")
        written.replace(path)
    except OSError as e:
        raise TuningError(f"{path} cannot be written: {e.strerror}; give another file with --out") from None


def row(key: Key, entry: Entry) -> dict[str, Any]:
    """An entry as JSON, without what it does not have."""
    blocks = str(entry.blocks) if entry.blocks else None
    times = {"tried": fastest_first(entry.tried), "company": fastest_first(entry.company)}
    fields = {**asdict(key), **asdict(entry), "blocks": blocks, **times}
    return {name: value for name, value in fields.items() if value not in (None, "", {})}


def fastest_first(times: Mapping[str, float | None]) -> dict[str, float | None]:
    return dict(sorted(times.items(), key=lambda item: (item[1] is None, item[1], item[0])))


def entry_of(row: Mapping[str, Any]) -> tuple[Key, Entry]:
    """Raises KeyError, TypeError or ValueError if it is none."""
    key = Key(str(row["device"]), int(row["version"]), str(row["op"]), int(row["width"]), int(row["rows"]))
    if min(key.width, key.rows) < 1:
        raise ValueError(f"width {key.width} and rows {key.rows} must be 1 at least")
    tried, company = times_of(row.get("tried", {})), times_of(row.get("company", {}))
    entry = Entry(
        kernel=str(row["kernel"]),
        us=float(row["us"]),
        blocks=blocks_of(row["blocks"]) if "blocks" in row else None,
        tried=tried,
        epilogue=str(row.get("epilogue", "")),
        jax=str(row.get("jax", "")),
        company=company,
    )
    return key, entry


def times_of(found: Mapping[str, Any]) -> dict[str, float | None]:
    for name in found:
        named(name)
    return {str(name): None if us is None else float(us) for name, us in found.items()}
