"""`python -m coalesce`: what it prints and writes, and what it says when it is used wrongly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import coalesce
from coalesce.__main__ import main
from coalesce.html import html_page

ROOT = Path(__file__).parent.parent

TENANTS = """
import jax, jax.numpy as jnp
import coalesce

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
ranker = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
wide = lambda p, x: x @ p["a"] + jnp.sin(x) @ p["b"]
loop = lambda w, x: jax.lax.while_loop(lambda c: (c @ w).sum() < 9, lambda c: c + 1, x)
nhwc = dict(padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
grouped = lambda k, x: jax.lax.conv_general_dilated(x, k, (1, 1), feature_group_count=4, **nhwc)

def trace(fn, p, x):
    return [coalesce.trace(fn, p, x, name=name) for name in "ab"]

def programs(): return trace(ranker, {"a": f32(4, 8), "b": f32(8, 2)}, f32(1, 4))
def pairs(): return trace(wide, {"a": f32(4, 8), "b": f32(4, 8)}, f32(1, 4))
def loops(): return trace(loop, f32(4, 4), f32(4))
def images(): return trace(grouped, f32(3, 3, 2, 8), f32(1, 4, 4, 8))
def one(): return programs()[0]
def nothing(): return []
def mixed(): return [*programs(), 3]
def fused(): return coalesce.fuse(programs())
def twice(): return programs() + programs()
def untraceable(): return trace(lambda p, x: float(x), f32(), f32())
def own_mistake(): return 1 // 0
def long(): return trace(lambda p, x: [x := jnp.tanh(x @ p) for _ in range(150)][-1], f32(4, 4), f32(1, 4))
def needs(folder, *, seed): return []
def optional(seed=0, *rest): return programs()
"""

MODULE = "tenants_of_test_inspect"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the module above, as the current one."""
    (tmp_path / f"{MODULE}.py").write_text(TENANTS)
    (tmp_path / "imports_what_is_missing.py").write_text("import missing_package_of_test_inspect\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return tmp_path


def python_m(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coalesce", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=120)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def test_text_is_explain(here, capsys):
    assert main(["inspect", f"{MODULE}:programs"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 programs in 1 family: 4 heavy ops -> 2 superkernels, 0 alone")
    assert "# superkernels\npack 0 x2 dot M=1 N=8 K=4" in text
    fused = coalesce.fuse(sys.modules[MODULE].programs())
    timings = re.compile(r"\([\d.]+ ms")
    assert timings.sub("", text) == timings.sub("", fused.explain() + "\n")


def test_page_is_written_and_announced(here, capsys):
    assert main(["inspect", f"{MODULE}:programs", "--html", "page.html"]) == 0
    fused = coalesce.fuse(sys.modules[MODULE].programs())
    assert capsys.readouterr().out == f"{fused.report}\nwrote page.html\n"
    assert (here / "page.html").read_text(encoding="utf-8") == html_page(fused)


@pytest.mark.once  # the hash seeds of one Python are enough
def test_page_is_the_same_in_another_process(here):
    """Which has another hash seed, as this one's is drawn."""
    assert main(["inspect", f"{MODULE}:pairs", "--html", "here.html"]) == 0
    done = python_m("inspect", f"{MODULE}:pairs", "--html", "there.html", cwd=here, PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    assert (here / "here.html").read_bytes() == (here / "there.html").read_bytes()


def test_options_reach_fuse(here, capsys):
    def text(*arguments):
        assert main(["inspect", *arguments]) == 0
        return capsys.readouterr().out

    assert "-> 2 superkernels" in text(f"{MODULE}:pairs")
    assert "-> 1 superkernel" in text(f"{MODULE}:pairs", "--within-program")
    assert "2 alone" in text(f"{MODULE}:loops")
    assert "0 alone" in text(f"{MODULE}:loops", "--pack-unbounded-loops")
    assert "groups=4" in text(f"{MODULE}:images", "--platform", "cpu")
    assert ": conv_grouped" not in text(f"{MODULE}:images", "--platform", "cpu")
    assert ": conv_grouped" in text(f"{MODULE}:images", "--platform", "gpu")


def test_optional_parameters_are_left_to_the_function(here):
    assert main(["inspect", f"{MODULE}:optional", "--html", "page.html"]) == 0


def test_reader_that_stops_early_is_no_error(here):
    """Of a process that finds its module in the current folder."""
    command = [sys.executable, "-m", "coalesce", "inspect", f"{MODULE}:long"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=here, env=environment(), stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"2 programs in 1 family: 300 heavy ops -> 150 superkernels")
        process.stdout.close()
        assert b"Error" not in process.stderr.read()
    assert process.returncode == 0


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert re.fullmatch(rf"coalesce-jax \S.*, jax {re.escape(jax.__version__)}\n", capsys.readouterr().out)


WRONG = {
    f"{MODULE}": "not of the form MODULE:FUNCTION",
    f"{MODULE}.py:": "not of the form MODULE:FUNCTION",
    f"./{MODULE}.py:programs": "not of the form MODULE:FUNCTION",
    f"{MODULE}.py:programs": "leave .py out",
    "no_module_of_that_name:programs": "no module 'no_module_of_that_name' in ",
    "json.no_such_part:programs": "no module 'json.no_such_part'",
    f"{MODULE}:program": "no 'program'; did you mean 'programs'?",
    f"{MODULE}:TENANTS": "has no 'TENANTS'",
    f"{MODULE}:jnp": "is a module; expected a function without parameters that returns a list",
    f"{MODULE}:needs": "needs folder, seed; expected a function without parameters",
    f"{MODULE}:one": "returned one program; return a list",
    f"{MODULE}:nothing": "returned no programs",
    f"{MODULE}:mixed": "a list whose item 2 is a int; expected",
    f"{MODULE}:fused": "returned a Fused; expected",
    f"{MODULE}:twice": "PlanError: two tenants are called 'a'",
    f"{MODULE}:untraceable": "TraceError: tenant 'a': ",
}


@pytest.mark.parametrize("target", WRONG)
def test_what_the_user_can_put_right_is_a_message(here, capsys, target):
    assert main(["inspect", target]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("python -m coalesce: ")
    assert WRONG[target] in err


def test_a_page_that_cannot_be_written(here, capsys):
    assert main(["inspect", f"{MODULE}:programs", "--html", "no/folder/page.html"]) == 2
    assert "no/folder/page.html cannot be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["look"], ["inspect", "a:b", "--platform", "abacus"]])
def test_unknown_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m coalesce" in capsys.readouterr().err


def test_the_users_own_exceptions_keep_their_traceback(here):
    with pytest.raises(ZeroDivisionError):
        main(["inspect", f"{MODULE}:own_mistake"])
    with pytest.raises(ModuleNotFoundError, match="missing_package_of_test_inspect"):
        main(["inspect", "imports_what_is_missing:programs"])
