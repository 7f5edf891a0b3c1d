"""Result files: rows of numbers under a header that says what they were measured with, as JSON, a table and a plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import jax

from coalesce.scheduler.native import is_native, stale

Row = dict[str, Any]
PER_RUN = ("command", "date")  # may differ between two runs that fill one file


def device_name() -> str:
    """The device in words that name no machine."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


def device_folder() -> str:
    """`cpu`, or the model of the accelerator: "NVIDIA H100 80GB HBM3" -> "h100"."""
    device = jax.devices()[0]
    model = re.search(r"\b[A-Za-z]+\d+\w*\b", device.device_kind)
    return "cpu" if device.platform == "cpu" else (model.group() if model else device.platform).lower()


def header(command: str, device: str, note: str = "", **settings: Any) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "numpy")
    if stale():
        raise SystemExit(f"compiled of other sources: {', '.join(stale())}; `make native` does it again")
    policy = {"policy": "compiled by mypyc"} if is_native() else {}
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "note": note,
        **({"xla_flags": flags} if (flags := os.environ.get("XLA_FLAGS")) else {}),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}, **policy},
        "settings": settings,
    }


def named(stem: str) -> str:
    """The name of a JSON file: results of a compiled policy do not take the place of those of its sources."""
    return f"{stem}{'_native' if is_native() else ''}.json"


FORCE, OUT = "--force measures all of it again", "--out names another folder"


def writable(folder: Path, instead: str = OUT) -> Path:
    """The folder, made if it is not there; asked for before anything is measured that would go into it.

    Raises:
      SystemExit: nothing can be written into it; it says what can be done `instead`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return folder
    except OSError as e:
        raise SystemExit(f"{folder} is no folder to write results into ({e.strerror}); {instead}") from None


def writable_file(path: Path, instead: str) -> Path:
    """The same of a file that is written in the end."""
    there = path.exists()
    try:
        path.open("ab").close()
    except OSError as e:
        raise SystemExit(f"{path} is no file to write ({e.strerror}); {instead}") from None
    if not there:
        path.unlink()
    return path


def load_rows(path: Path, head: Mapping[str, Any], instead: str = FORCE) -> list[Row]:
    """Rows of an earlier run with the same header.

    Raises:
      SystemExit: the file was measured with something else; it says what can be done `instead`.
    """
    if not path.exists():
        return []
    saved = json.loads(path.read_text(encoding="utf-8"))
    differ = [key for key in head if key not in PER_RUN and saved["header"].get(key) != head[key]]
    if differ:
        raise SystemExit(f"{path} was measured with other {', '.join(differ)}; {instead}")
    return saved["rows"]


def save_rows(path: Path, head: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Replace the file in one step, so that a killed run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    top = json.dumps(dict(head), indent=2).replace("\n", "\n  ")
    text = f'{{\n  "header": {top},\n  "rows": [\n{lines}\n  ]\n}}\n'
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for reading as it is: the first column to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]

    def row(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join(map(row, [columns, rule, *lines]))


def plot(path: Path, title: str, rows: Sequence[Row], *, x: str, line: str) -> str:
    """Medians with their p10 to p90 band on log axes, one line for each value of `line`; returns what to print."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'coalesce-jax[plot]')"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row[line] for row in rows):
        points = sorted((row for row in rows if row[line] == name), key=lambda row: row[x])
        if not (points := [row for row in points if not row["failed"]]):
            continue
        at = [row[x] for row in points]
        axes.plot(at, [row["round_us_median"] for row in points], marker="o", label=name)
        low, high = ([row[f"round_us_{q}"] for row in points] for q in ("p10", "p90"))
        axes.fill_between(at, low, high, alpha=0.15)
    ticks = sorted({row[x] for row in rows})
    axes.set(title=title, xlabel=x, ylabel="microseconds a round", xscale="log", yscale="log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return f"plot: {path}"
