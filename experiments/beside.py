"""Measure the cells of an experiment in processes beside each other, of which one at a time runs while it times.

A cell spends most of its time in compilers, which leave most of a host and of a device idle. Each process runs the
experiment's own command for one cell. Before it times, it asks for its turn (experiments/alone.py): then all others are
stopped, as by a shell's Ctrl-Z, until it is done. The processes take turns in which device is theirs. What XLA times
while it compiles, to choose among kernels, is not alone.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path

import jax
from absl import flags

from experiments.alone import ASK, DONE, GRANTED, TURNS

ENDED = b"x"
TURN_S = 300.0  # of one process, at most
STOPS_S = 1.0  # that a process is waited for to stop
LOOKS_S = 0.001
SETTLES_S = 0.03  # what stopped processes have given to the device is done by then
HELP = "Pass --help"  # how absl ends what it says of a flag
OF_A_CELL = ("out", "force")


class Beside:
    """Processes of one command, at most so many at once; each gets the flags of its cell besides."""

    def __init__(
        self, command: Sequence[str], processes: int, folder: Path, env: Mapping[str, str], devices: int = 1
    ) -> None:
        self.command, self.processes, self.devices = command, processes, devices
        self.folder, self.env = folder, env
        self.turn = threading.Lock()  # of the process that times, or of one that begins
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.over = False  # no process begins any more
        self.beginning = threading.Lock()  # of both of these

    def measure(
        self, cells: Sequence[Sequence[str]], ended: Callable[[Path], None], budget_s: float | None = None
    ) -> None:
        """Begin the cells in the order given, but none after so many seconds. `ended` gets the folder of each that has
        ended, in the caller's thread, and where the run is interrupted of all that have begun. A process that fails is
        named on stderr."""
        until = time.monotonic() + (inf if budget_s is None else budget_s)
        told: set[int] = set()
        with terminated_as_interrupted(), ThreadPoolExecutor(self.processes) as pool:
            started = {pool.submit(self.one, number, cell, until): number for number, cell in enumerate(cells)}
            try:
                for future in as_completed(started):
                    number = started[future]
                    if failure := future.result():
                        print(f"{' '.join(cells[number])}: {failure}", file=sys.stderr, flush=True)
                    told.add(number)
                    ended(self.place(number))
            except BaseException:
                with self.beginning:
                    self.over = True
                    for process in list(self.running.values()):
                        signal_all(process, signal.SIGKILL)
                for number in sorted({*started.values()} - told):
                    if self.place(number).exists():
                        ended(self.place(number))
                raise

    def place(self, number: int) -> Path:
        return self.folder / str(number)

    def one(self, number: int, cell: Sequence[str], until: float) -> str:
        """Why the cell's process did not end well; empty if it did."""
        if (left := until - time.monotonic()) <= 0:
            return "not begun, since the budget is spent"
        self.place(number).mkdir(parents=True, exist_ok=True)
        log = self.place(number) / "log"
        command = [*self.command, *cell, f"--out={self.place(number)}"]
        command += [f"--budget_s={left:.0f}"] if left < inf else []
        with open(log, "wb") as output, self.turn, self.beginning:
            if self.over:
                return "not begun, since the run was interrupted"
            asked, ask = os.pipe()
            granted, grant = os.pipe()
            process = self.running[number] = subprocess.Popen(
                command,
                env={**self.env, **self.device_of(number), TURNS: f"{ask} {granted}"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(ask, granted),
                start_new_session=True,  # a group of its own, so that it is stopped with all that it starts
            )
        threading.Thread(target=tell_end, args=(process, ask)).start()
        overdue = self.grant_turns(number, asked, grant)
        signal_all(process, signal.SIGKILL)  # what it has left running
        while overdue and os.read(asked, 1) != ENDED:
            pass
        status = process.wait()
        del self.running[number]
        for end in (asked, ask, granted, grant):
            os.close(end)
        lines = log.read_text(errors="replace").strip().splitlines()
        lines = [line for line in lines if not line.startswith(HELP)]
        if overdue:
            return f"ended, since it timed for more than {TURN_S:.0f} s without an end, while all others stood still"
        return (lines or [f"exit status {status}"])[-1] if status else ""

    def device_of(self, number: int) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": str(number % self.devices)} if self.devices > 1 else {}

    def grant_turns(self, number: int, asked: int, grant: int) -> bool:
        """Until the process ends; whether it should, since one of its turns does not."""
        while os.read(asked, 1) == ASK:
            with self.turn, self.stopped(number):
                os.write(grant, GRANTED)
                if not select.select([asked], [], [], TURN_S)[0]:
                    return True
                if os.read(asked, 1) != DONE:
                    return False
        return False

    @contextmanager
    def stopped(self, but: int) -> Iterator[None]:
        others = [process for number, process in list(self.running.items()) if number != but]
        # Each by itself first: while it starts another process it cannot stop before that one runs, which a signal to
        # both of them would keep it from.
        for process in others:
            signal_one(process, signal.SIGSTOP)
        for process in others:
            wait_for_stop(process)
        for process in others:
            signal_all(process, signal.SIGSTOP)
        time.sleep(SETTLES_S if others else 0)
        try:
            yield
        finally:
            for process in others:
                signal_all(process, signal.SIGCONT)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM is an exception, as Ctrl-C is, so that no process is left behind that nobody wakes up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell_end(process: subprocess.Popen[bytes], ask: int) -> None:
    """Where its turns are asked for: the other end of a pipe may be held by what the process has started."""
    process.wait()
    os.write(ask, ENDED)


def wait_for_stop(process: subprocess.Popen[bytes]) -> None:
    """Or its end: a signal waits for whoever is in a call of the system, which takes its time where much runs. Not for
    ever: all but the thread that is in that call stand still."""
    until = time.monotonic() + STOPS_S
    with suppress(ChildProcessError):  # `tell_end` has seen its end
        while not os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG):
            if time.monotonic() > until:
                return
            time.sleep(LOOKS_S)


def signal_one(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)


def signal_all(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def handed_on(without: Iterable[str]) -> list[str]:
    """The flags that this process was given, but for those and the ones that each cell's process has its own of."""
    given = flags.FLAGS
    names = [name for name in given if given[name].present and name not in (*without, *OF_A_CELL)]
    return [flag for name in names for flag in shlex.split(given[name].serialize())]


def environment() -> dict[str, str]:
    """A cell's: all of them read and write one compilation cache, and PyTorch compiles in the process that asks."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "coalesce" / "experiments")
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its own pool of processes would not be stopped
    }


def devices() -> int:
    """How many a process of a cell may be given one of."""
    return jax.local_device_count() if jax.default_backend() == "gpu" else 1
