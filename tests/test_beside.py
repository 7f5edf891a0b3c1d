"""Processes beside each other, of which one at a time runs while it times."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.alone import alone, ASK, TURNS, turns
from experiments.beside import Beside

ROOT = Path(__file__).parent.parent
HEAD = f"""
import os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from experiments.alone import alone
out = Path(sys.argv[-1].removeprefix("--out=")).parent

def count():
    path = out / "count"
    return path.stat().st_size if path.exists() else 0

def wait(until):
    while not until():
        time.sleep(0.001)
"""
COUNTS = """
while not (out / "enough").exists():
    with open(out / "count", "ab") as file:
        file.write(b".")
"""
TIMES = """
wait(count)
with alone():
    before = count()
    time.sleep(0.2)
    (out / "moved").write_text(str(count() - before))
wait(lambda: count() > before)
(out / "enough").touch()
"""
NEVER_ENDS = """
wait(count)
with alone():
    (out / "hangs").touch()
    time.sleep(1000)
"""
SEES_A_TURN = """
wait((out / "hangs").exists)
before = count()
wait(lambda: count() > before)
(out / "enough").touch()
"""
DIES = """
wait(count)
with alone():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], close_fds=False)
    print("it broke", file=sys.stderr, flush=True)
    (out / "died").touch()
    os._exit(3)
"""
SEES = """
wait((out / "died").exists)
before = count()
wait(lambda: count() > before)
(out / "enough").touch()
"""

STARTS = """
os.mkfifo(out / "pipe")
(out / "starts").write_text(str(os.getpid()))
opens = (os.POSIX_SPAWN_OPEN, 0, str(out / "pipe"), os.O_RDONLY, 0)
os.posix_spawn(sys.executable, [sys.executable, "-c", ""], dict(os.environ), file_actions=[opens])
"""
TIMES_BESIDE_A_START = """
wait(lambda: (out / "starts").exists() and (out / "starts").read_text())
pid = (out / "starts").read_text()
wait(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text())
with alone():
    (out / "timed").touch()
open(out / "pipe", "w").close()
"""


def run(folder: Path, *codes: str, budget_s: float | None = None) -> list[str]:
    """Each code in a process of its own, all of them at once; returns the folders in the order in which they ended."""
    ended: list[str] = []
    beside = Beside([sys.executable, "-c"], len(codes), folder, dict(os.environ))
    beside.measure([[HEAD + code] for code in codes], lambda place: ended.append(place.name), budget_s)
    return ended


def test_who_times_does_so_alone_and_the_others_go_on(tmp_path):
    assert sorted(run(tmp_path, COUNTS, TIMES)) == ["0", "1"]
    assert (tmp_path / "moved").read_text() == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="what a start waits for is Linux's")
def test_one_that_is_starting_a_process_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    """It stops when the other one runs, which here waits for somebody to open a pipe."""
    monkeypatch.setattr("experiments.beside.STOPS_S", 0.1)
    assert sorted(run(tmp_path, STARTS, TIMES_BESIDE_A_START)) == ["0", "1"]
    assert (tmp_path / "timed").exists()


def test_one_that_dies_in_its_turn_is_named_and_stops_nobody(tmp_path, capfd):
    assert sorted(run(tmp_path, COUNTS, DIES, SEES)) == ["0", "1", "2"]
    assert "it broke" in capfd.readouterr().err


def test_a_turn_without_an_end_is_ended(tmp_path, capfd, monkeypatch):
    """Its time is up when it hangs, however long the process took to get there."""

    def nothing_comes(*_: object) -> tuple[list[int], list[int], list[int]]:
        while not (tmp_path / "hangs").exists():
            time.sleep(0.001)
        return [], [], []

    monkeypatch.setattr("experiments.beside.select", SimpleNamespace(select=nothing_comes))
    assert sorted(run(tmp_path, COUNTS, NEVER_ENDS, SEES_A_TURN)) == ["0", "1", "2"]
    assert "ended, since it timed for more than 300 s" in capfd.readouterr().err


def test_no_cell_begins_when_the_budget_is_spent(tmp_path, capfd):
    run(tmp_path, "(out / 'begun').touch()", budget_s=0)
    assert "not begun, since the budget is spent" in capfd.readouterr().err
    assert not (tmp_path / "begun").exists()


@pytest.fixture
def interrupted():
    """By Ctrl-C, also where whoever started the tests ignores that, as shells do for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_ended_leaves_no_process(end, tmp_path, interrupted):
    seen: list[str] = []

    def ended(place: Path) -> None:
        seen.append(place.name)
        if seen == ["1"]:
            os.kill(os.getpid(), end)

    beside = Beside([sys.executable, "-c"], 2, tmp_path, dict(os.environ))
    with pytest.raises(KeyboardInterrupt):
        beside.measure([[HEAD + COUNTS], [HEAD + "wait(count)"], [HEAD + COUNTS]], ended)
    assert seen[:2] == ["1", "0"]  # what it has left is not lost
    assert not beside.running and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not (tmp_path / "2" / "log").exists() or not (tmp_path / "2" / "log").read_text()


def test_a_process_by_itself_need_not_ask_and_one_whose_granter_has_ended_is_told(monkeypatch):
    monkeypatch.delenv(TURNS, raising=False)
    with alone():
        assert turns() == ()
    asked, ask = os.pipe()
    granted, grant = os.pipe()
    os.close(grant)
    monkeypatch.setenv(TURNS, f"{ask} {granted}")
    with pytest.raises(RuntimeError, match="the process that grants turns has ended"), alone():
        raise AssertionError("it timed beside others")
    assert os.read(asked, 1) == ASK
    for end in (asked, ask, granted):
        os.close(end)
