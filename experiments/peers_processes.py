"""Peers of n processes, one tenant each, on one device: sliced in time by the driver, or side by side under MPS.

Between turns the processes wait. In a turn each serves a burst of requests as fast as it can, one after the other, and
measures each of them; start and end of the turn weigh as little as the burst is long.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import peers_torch
from experiments.alone import alone, turns
from experiments.methods import Candidate
from experiments.peers_common import Burst, CannotRun, Cell, Configurations, OneTenant

VISIBLE = "CUDA_VISIBLE_DEVICES"
START_S = 240.0  # a worker that is not ready by then, or takes as long for a burst, is given up
END_S = 20.0
BURST_S = 0.3  # how long a burst is meant to take
BURST = 50  # most requests of a burst


class Workers:
    """The processes of a cell, each of them ready; all of them serve in the form that the first one chose."""

    def __init__(self, tenants: Sequence[OneTenant], env: Mapping[str, str]) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.outputs: list[np.ndarray] = []
        self.form: list[Any] = []
        self.errors = tempfile.TemporaryFile("w+")
        self.tenants, self.env = tenants, env

    def __enter__(self) -> Workers:
        try:
            self.start(self.tenants[:1])  # its compiled program is in the cache when the others look for it
            few = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # a pool of compilers for each of them would be a crowd
            self.start([replace(tenant, form=self.form) for tenant in self.tenants[1:]], few)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()  # the end of its input is the end of a worker
        for process in self.processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self.errors.close()

    def start(self, tenants: Sequence[OneTenant], env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "experiments.peers_worker"]
        new = [
            subprocess.Popen(
                [*command, json.dumps(asdict(tenant))],
                env={**(env or {}), **self.env},
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                pass_fds=turns(),
            )
            for tenant in tenants
        ]
        self.processes += new
        for answer in self.answers(new):
            self.form = answer["form"]
            self.outputs.append(np.array(answer["outputs"], np.float64))

    def answers(self, processes: Sequence[subprocess.Popen[str]]) -> list[Any]:
        """A line from each; one that is silent for too long is killed, which ends its output."""
        stop = threading.Timer(START_S, lambda: [process.kill() for process in processes])
        stop.start()
        try:
            lines = [process.stdout.readline() for process in processes if process.stdout]
        finally:
            stop.cancel()
        if not all(lines):
            raise CannotRun(f"{lines.count('')} of {len(lines)} processes ended: {self.last_words()}")
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return lines[-1][:300] if lines else "no message"

    def burst(self, requests: int) -> list[list[float]]:
        """Each process serves so many requests; returns seconds for each of them."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{requests}\n")
            process.stdin.flush()
        return self.answers(self.processes)


def time_sliced(cell: Cell) -> Configurations:
    for engine in ("jax", "torch"):
        yield {"engine": engine}, partial(processes, cell, engine, dict(os.environ))


def under_mps(cell: Cell) -> Configurations:
    control = mps_control()
    env = cell.until_end.enter_context(mps(control))
    for engine in ("jax", "torch"):
        yield {"engine": engine}, partial(processes, cell, engine, env)


def processes(cell: Cell, engine: str, env: Mapping[str, str]) -> Iterator[Burst]:
    """Every process draws its tenant's weights itself, by the tenant's number."""
    if engine == "torch":
        peers_torch.check(cell)
    cache = cell.until_end.enter_context(tempfile.TemporaryDirectory())
    env = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **env,
    }
    if engine == "torch":
        env["JAX_PLATFORMS"] = "cpu"  # JAX draws the weights only
    given = cell.model.name, cell.fields, cell.dtype
    others = cell.batch, cell.options[0], cell.precision, cell.autotune
    tenants = [OneTenant(*given, i, engine, *others) for i in range(cell.count)]
    workers = cell.until_end.enter_context(Workers(tenants, env))
    with alone():
        workers.burst(3)
        start = time.perf_counter()
        workers.burst(5)
        requests = max(1, min(BURST, round(5 * BURST_S / (time.perf_counter() - start))))
    latencies: list[float] = []

    def run() -> list[np.ndarray]:
        latencies.extend(second for tenant in workers.burst(requests) for second in tenant)
        return workers.outputs

    how = "JAX executables" if engine == "jax" else "PyTorch CUDA graphs"
    if workers.form:
        weights, compiled = workers.form
        how += f", weights {weights}{', compiled' * bool(compiled)}"
    yield Burst(Candidate(f"{how}, bursts of {requests} requests", run), requests, latencies)


def mps_control() -> str:
    """The daemon's control program, which the driver brings; it often lies beside nvidia-smi."""
    if jax.default_backend() != "gpu":
        raise CannotRun("needs a GPU: MPS is NVIDIA's multi-process service")
    smi = shutil.which("nvidia-smi")
    beside = [str(Path(smi).parent), str(Path(smi).resolve().parent)] if smi else []
    places = os.pathsep.join([os.environ.get("PATH", ""), *beside, "/usr/local/nvidia/bin"])
    found = shutil.which("nvidia-cuda-mps-control", path=places)
    if found is None:
        raise CannotRun("nvidia-cuda-mps-control is neither on PATH nor beside nvidia-smi")
    return found


def renumbered(visible: str) -> dict[str, str]:
    """What an MPS daemon that sees some devices alone calls them: its clients count them from 0."""
    return {VISIBLE: ",".join(str(i) for i, _ in enumerate(visible.split(",")))} if visible else {}


@contextmanager
def mps(control: str) -> Iterator[dict[str, str]]:
    """The environment of clients of an MPS daemon of our own; it changes nothing of the card's settings."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as pipes:
        env = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": pipes, "CUDA_MPS_LOG_DIRECTORY": pipes}
        started = subprocess.run([control, "-d"], env=env, capture_output=True, text=True, timeout=60)
        if started.returncode:
            raise CannotRun(f"MPS does not start: {(started.stderr or started.stdout).strip()[:200]}")
        try:
            yield {**env, **renumbered(env.get(VISIBLE, ""))}
        finally:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run([control], input="quit\n", env=env, capture_output=True, text=True, timeout=END_S)
