"""--help of an experiment lists what it takes: absl lists the flags that are the script's own, or that it declared."""

import ast
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import app, flags

from experiments.list_flags import define_counts

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = [path.stem for path in sorted(FOLDER.glob("*.py")) if "app.run(main)" in path.read_text()]
ALSO = {"slo_attainment": ["slo_serve"], "multiplexing": ["multiplexing_bench"]}  # whose code reads flags for a script

pytestmark = pytest.mark.once


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No experiment is imported, and absl has no flags: two experiments have some of one name."""
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    imported, kept = set(sys.modules), dict(vars(flags.FLAGS))
    vars(flags.FLAGS).clear()
    vars(flags.FLAGS).update(vars(flags.FlagValues()))
    yield
    vars(flags.FLAGS).clear()
    vars(flags.FLAGS).update(kept)
    for name in set(sys.modules) - imported:
        if name.split(".")[0] == "experiments":
            del sys.modules[name]


def read_by(*modules: str) -> set[str]:
    """`dtype` of FLAGS.dtype, and of flags.FLAGS.dtype."""
    nodes = [node for name in modules for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text()))]
    found = [node for node in nodes if isinstance(node, ast.Attribute)]
    return {node.attr for node in found if ast.unparse(node.value) in ("FLAGS", "flags.FLAGS")} - {"set_default"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_what_a_script_reads(anew, monkeypatch, script):
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.setattr(app, "run", lambda main: None)
    runpy.run_module(f"experiments.{script}", run_name="__main__")
    listed = flags.FLAGS.main_module_help()
    names = read_by(script, *ALSO.get(script, ()))
    if "settings.begin(" in (FOLDER / f"{script}.py").read_text():
        names |= read_by("settings")
    assert {name for name in names if f"--{name}:" not in listed and f"--[no]{name}:" not in listed} == set()


def test_a_flag_of_several_values_belongs_to_who_defines_it():
    own = flags.FlagValues()
    define_counts("widths", [1], "how many", flag_values=own)
    assert [flag.name for flag in own.get_key_flags_for_module(__name__)] == ["widths"]
