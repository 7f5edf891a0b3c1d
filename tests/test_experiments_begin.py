"""What experiments do before they measure: --help lists what they take, and where results go is tried out."""

import ast
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from absl import app, flags, logging

from experiments import host_time, loadgen, planning_time, segments, serve_demo
from experiments.list_flags import define_counts
from experiments.results import writable_file

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = [path.stem for path in sorted(FOLDER.glob("*.py")) if "app.run(main)" in path.read_text()]
ALSO = {"slo_attainment": ["slo_serve"], "multiplexing": ["multiplexing_bench"]}  # whose code reads flags for a script
WRITE_IN_THE_END = ("compile_cost", "hindsight", "packing_regret", "simulator_speed", "tenant_scaling", "tile_model")

pytestmark = pytest.mark.once


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No experiment is imported, and absl has no flags: two experiments have some of one name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(logging, "set_verbosity", lambda level: None)  # it sets a flag
    imported, kept = set(sys.modules), dict(vars(flags.FLAGS))
    vars(flags.FLAGS).clear()
    vars(flags.FLAGS).update(vars(flags.FlagValues()))
    yield
    vars(flags.FLAGS).clear()
    vars(flags.FLAGS).update(kept)
    for name in set(sys.modules) - imported:
        if name.split(".")[0] == "experiments":
            del sys.modules[name]


def start(monkeypatch: pytest.MonkeyPatch, run: Callable[[Callable[[list[str]], None]], None], *argv: str) -> None:
    """As `python -m experiments.SCRIPT` does, with another app.run."""
    monkeypatch.setattr(sys, "argv", [*argv])
    monkeypatch.setattr(app, "run", run)
    runpy.run_module(f"experiments.{argv[0]}", run_name="__main__")


def read_by(*modules: str) -> set[str]:
    """`dtype` of FLAGS.dtype, and of flags.FLAGS.dtype."""
    nodes = [node for name in modules for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text()))]
    found = [node for node in nodes if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if ast.unparse(node.value) in ("FLAGS", "flags.FLAGS")} - {"set_default"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_what_a_script_reads(anew, monkeypatch, script):
    start(monkeypatch, lambda main: None, script)
    listed = flags.FLAGS.main_module_help()
    names = read_by(script, *ALSO.get(script, ()))
    if "settings.begin(" in (FOLDER / f"{script}.py").read_text():
        names |= read_by("settings")
    assert {name for name in names if f"--{name}:" not in listed and f"--[no]{name}:" not in listed} == set()


def test_a_flag_of_several_values_belongs_to_who_defines_it():
    own = flags.FlagValues()
    define_counts("widths", [1], "how many", flag_values=own)
    assert [flag.name for flag in own.get_key_flags_for_module(__name__)] == ["widths"]


@pytest.mark.parametrize("script", WRITE_IN_THE_END)
def test_results_that_cannot_be_kept_are_not_measured(anew, monkeypatch, tmp_path, script):
    (tmp_path / "file").touch()
    out = "folder" if script == "tile_model" else "out"
    with pytest.raises(SystemExit, match=f"is no folder to write results into .*; --{out} names another"):
        start(monkeypatch, lambda main: main(flags.FLAGS(sys.argv)), script, f"--{out}={tmp_path / 'file'}")


@pytest.mark.parametrize("main", [module.main for module in (host_time, loadgen, planning_time, segments)])
def test_the_same_of_scripts_with_flags_of_their_own(main):
    with pytest.raises(SystemExit, match="is no folder to write results into .*; --out names another folder"):
        main(["--out=/proc/nowhere"])


def test_a_trace_that_cannot_be_kept_is_not_recorded(tmp_path):
    with pytest.raises(SystemExit, match="is no file to write .*No such file.*; --trace names another"):
        serve_demo.main([f"--trace={tmp_path / 'no' / 'trace.json'}"])
    assert writable_file(tmp_path / "trace.json", "") == tmp_path / "trace.json" and not list(tmp_path.iterdir())
