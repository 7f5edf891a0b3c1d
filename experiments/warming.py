"""Compile the cells of an experiment in processes beside each other, before they are timed one by one.

A cell spends more time in compilers than in its measurement, and compilers leave most of a host idle. Each process runs
the experiment's own command for one cell, a few rounds of it, into a folder that is thrown away; what it compiled lies
in JAX's compilation cache, and PyTorch's, where the cell that is timed finds it. Nothing is timed meanwhile.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
from absl import flags

ROUNDS = {"repeats": 3, "seconds": 1}  # enough to choose a configuration: only their programs are wanted
HELP = "Pass --help"  # how absl ends what it says of a flag
OF_A_RUN = (*ROUNDS, "out", "force")


def compile_beside(
    script: str, cells: Sequence[Sequence[str]], processes: int, cache: str, seconds: float | None = None
) -> None:
    """Run `python -m experiments.<script> FLAGS` for each cell's flags, so many at once, each at most `seconds` long.

    A process that fails or does not end is named on stderr, and its cell is compiled where it is timed.
    """
    with TemporaryDirectory() as out, ThreadPoolExecutor(processes) as pool:
        run = partial(compile_cell, script, out=Path(out), cache=cache, seconds=seconds)
        for cell, failure in zip(cells, pool.map(run, cells), strict=True):
            if failure:
                print(f"not compiled ahead: {' '.join(cell)}: {failure}", file=sys.stderr, flush=True)


def handed_on(without: Iterable[str]) -> list[str]:
    """The flags that this process was given, but for those and the ones that each cell's process has its own of."""
    given = flags.FLAGS
    names = [name for name in given if given[name].present and name not in (*without, *OF_A_RUN)]
    return [flag for name in names for flag in shlex.split(given[name].serialize())]


def share_cache() -> str:
    """The folder of JAX's compilation cache, which this process reads from now on, however little something took."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "coalesce" / "experiments")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def compile_cell(script: str, cell: Sequence[str], out: Path, cache: str, seconds: float | None) -> str:
    """Why the cell's process did not do its work; empty if it did."""
    own = out / str(abs(hash(tuple(cell))))
    command = [sys.executable, "-m", f"experiments.{script}", *cell, "--force", f"--out={own}"]
    command += [f"--{name}={value}" for name, value in ROUNDS.items()]
    caches = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    try:
        done = subprocess.run(
            command, env=os.environ | caches, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:g} s"
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith(HELP)]
    return (lines or [f"exit status {done.returncode}"])[-1] if done.returncode else ""
