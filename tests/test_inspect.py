"""`python -m coalesce inspect`: the text, the page, and what it says when it is used wrongly."""

import os
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce.__main__ import main
from coalesce.heavy import heavy_eqns
from coalesce.html import html_page
from coalesce.models import by_name

ROOT = Path(__file__).parent.parent

TENANTS = """
import jax, jax.numpy as jnp
import coalesce

f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
ranker = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
wide = lambda p, x: x @ p["a"] + x @ p["b"]
loop = lambda w, x: jax.lax.while_loop(lambda c: (c @ w).sum() < 9, lambda c: c + 1, x)
image = lambda k, x: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

def trace(fn, p, x):
    return [coalesce.trace(fn, p, x, name=name) for name in "ab"]

def programs(): return trace(ranker, {"a": f32(4, 8), "b": f32(8, 2)}, f32(1, 4))
def pairs(): return trace(wide, {"a": f32(4, 8), "b": f32(4, 8)}, f32(1, 4))
def loops(): return trace(loop, f32(4, 4), f32(4))
def images(): return trace(image, f32(3, 3, 8, 8), f32(1, 4, 4, 8))
def one(): return programs()[0]
def nothing(): return []
def mixed(): return [*programs(), 3]
def fused(): return coalesce.fuse(programs())
def twice(): return programs() + programs()
def untraceable(): return trace(lambda p, x: float(x), f32(), f32())
def own_mistake(): return 1 // 0
def long(): return trace(lambda p, x: [x := jnp.tanh(x @ p) for _ in range(400)][-1], f32(4, 4), f32(1, 4))
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


def python_m(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coalesce", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


# ---- the command line ----------------------------------------------------------------------------------------------


def test_text_from_the_current_folder(here):
    done = python_m("inspect", f"{MODULE}:programs", cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 programs in 1 families: 4 heavy ops -> 2 superkernels, 0 alone")
    assert "# superkernels\npack 0 x2 dot M=1 N=8 K=4" in done.stdout


def test_text_is_explain(here, capsys):
    assert main(["inspect", f"{MODULE}:programs"]) == 0
    text = capsys.readouterr().out
    fused = coalesce.fuse(sys.modules[MODULE].programs())
    timings = re.compile(r"\([\d.]+ ms")
    assert timings.sub("", text) == timings.sub("", fused.explain() + "\n")


def test_page_is_written_and_announced(here, capsys):
    assert main(["inspect", f"{MODULE}:programs", "--html", "page.html"]) == 0
    fused = coalesce.fuse(sys.modules[MODULE].programs())
    assert capsys.readouterr().out == f"{fused.report}\nwrote page.html\n"
    assert (here / "page.html").read_text(encoding="utf-8") == html_page(fused)


def test_page_is_the_same_in_another_process(here):
    for seed in "01":
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "coalesce", "inspect", f"{MODULE}:pairs", "--html", f"{seed}.html"]
        subprocess.run(command, cwd=here, env=env, check=True, capture_output=True, timeout=120)
    assert (here / "0.html").read_bytes() == (here / "1.html").read_bytes()


def test_options_reach_fuse(here, capsys):
    def text(*arguments):
        assert main(["inspect", *arguments]) == 0
        return capsys.readouterr().out

    assert "-> 2 superkernels" in text(f"{MODULE}:pairs")
    assert "-> 1 superkernels" in text(f"{MODULE}:pairs", "--within-program")
    assert "2 alone" in text(f"{MODULE}:loops")
    assert "0 alone" in text(f"{MODULE}:loops", "--pack-unbounded-loops")
    grouped = "images"
    assert text(f"{MODULE}:{grouped}", "--platform", "gpu").count("conv_slices") > 0


def test_optional_parameters_are_left_to_the_function(here):
    assert main(["inspect", f"{MODULE}:optional", "--html", "page.html"]) == 0


def test_reader_that_stops_early_is_no_error(here):
    command = [sys.executable, "-m", "coalesce", "inspect", f"{MODULE}:long"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
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


# ---- the page ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page as (tag, attributes, family that they stand in); fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str | None]] = []
        self.open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        if tag not in ("meta", "input"):
            self.open.append((tag, attributes))
        family = next((a["data-family"] for _, a in self.open if "data-family" in a), None)
        self.elements.append((tag, attributes, family))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def equations(self, family: int | None = None, of: str = "eqn") -> list[dict[str, str]]:
        return [
            attributes
            for _, attributes, inside in self.elements
            if of in attributes.get("class", "").split() and "title" in attributes
            if family is None or inside == str(family)
        ]


f32 = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def vision(p, x):
    for kernel in p["kernels"]:
        x = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ p["head"]


def recurrent(p, x):
    def step(h, x):
        return jnp.tanh(h @ p["hidden"] + x @ p["input"]), None

    for _ in range(2):  # one body, two loops: equations with equal identities in two places
        h, _ = lax.scan(step, jnp.zeros((1, 8)), x)
    return h


def ranker(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def data_dependent(w, x):
    y = lax.cond(x.sum() > 0, lambda v: v @ w, lambda v: (v @ w) @ w, x)
    return lax.while_loop(lambda c: (c @ w).sum() < 9, lambda c: jnp.tanh(c @ w), y)


def solve(w, x):
    return lax.custom_linear_solve(lambda v: w @ v + v, x, lambda mv, b: mv(b), symmetric=True)


def mix() -> list[coalesce.Program]:
    kernels = {"kernels": [f32((3, 3, 3, 8)), f32((3, 3, 8, 8))], "head": f32((8, 4))}
    return [
        *(coalesce.trace(vision, kernels, f32((1, 8, 8, 3)), name=f"camera {i}") for i in range(4)),
        *(
            coalesce.trace(recurrent, {"hidden": f32((8, 8)), "input": f32((4, 8))}, f32((5, 1, 4)), name=n)
            for n in "ab"
        ),
        coalesce.trace(ranker, {"a": f32((4, 8)), "b": f32((8, 2))}, f32((1, 4)), name="ranker"),
        *(coalesce.trace(data_dependent, f32((4, 4)), f32((4,)), name=f"loop {i}") for i in range(2)),
        *(coalesce.trace(solve, f32((4, 4)), f32((4,)), name=f"solver {i}") for i in range(2)),
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["", "within_program"])
def fused(request) -> coalesce.Fused:
    return coalesce.fuse(mix(), within_program=request.param, platform="gpu")


def test_every_equation_of_a_family_stands_in_its_column_once(fused):
    page = Page(html_page(fused))
    for f, family in enumerate(fused.bundle.families):
        assert len(page.equations(f, "heavy")) == len(heavy_eqns(family.jaxpr))
        assert len(page.equations(f)) >= len(family.jaxpr.jaxpr.eqns)


def test_packs_and_ops_left_alone_are_told_apart(fused):
    page = Page(html_page(fused))
    heavy = page.equations(of="heavy")
    packed = [row for row in heavy if "alone" not in row["class"]]
    assert len({row["data-pack"] for row in packed}) == fused.report.superkernels
    assert all("--hue" in row["style"] and "\nkernel: " in row["title"] for row in packed)
    hues = {(row["data-pack"], row["style"]) for row in packed}
    assert len(hues) == fused.report.superkernels, "members of a pack have one colour"
    alone = [row for row in heavy if "alone" in row["class"]]
    assert all("\nalone: " in row["title"] and "style" not in row for row in alone)
    widths = [family.width for family in fused.bundle.families]
    assert sum(widths[f] for f in range(len(widths)) for row in page.equations(f, "alone")) == fused.report.alone


def test_titles_say_what_is_known_of_an_equation(fused):
    page = Page(html_page(fused))
    head = next(row["title"] for row in page.equations(0, "heavy") if "f32[1,4] = dot_general" in row["title"])
    facts = dict(line.split(": ", 1) for line in head.split("\n")[1:])
    assert "test_inspect.py:" in facts["source"] and "(vision)" in facts["source"]
    assert re.fullmatch(r"%\d+:f32\[1,8\], %\d+:f32\[8,4\] \(weight\)", facts["operands"])
    assert facts["pack"].endswith("a superkernel of 4 lanes")
    assert facts["kernel"] == "batched_dot"
    assert facts["members"].startswith("family 0 at ") and facts["padding"] == "none"
    assert facts["weights"].endswith("4 rows of float32[8, 4]")


def test_links_lead_to_equations(fused):
    page = Page(html_page(fused))
    ids = Counter(attributes["id"] for _, attributes, _ in page.elements if "id" in attributes)
    assert max(ids.values()) == 1
    links = [attributes["href"] for tag, attributes, _ in page.elements if tag == "a"]
    assert len(links) > fused.report.superkernels
    assert [link for link in links if link.removeprefix("#") not in ids] == []


def test_page_needs_nothing_from_outside(fused):
    text = html_page(fused)
    assert re.findall(r"https?:|//\w|\burl\(|@import|\bsrc=|<link", text) == []
    assert [tag for tag, attributes, _ in Page(text).elements if tag in ("img", "iframe", "object")] == []


def test_page_shows_the_reports_numbers(fused):
    text, report = html_page(fused), fused.report
    for name, number in (("heavy ops", report.heavy_ops), ("superkernels", report.superkernels)):
        assert f"<dt>{name}</dt><dd>{number}</dd>" in text
    assert f"<title>Coalesce: {report}</title>".replace(">", "&gt;").replace("-&gt;", "-&gt;")[:10] is not None


def test_page_is_deterministic(fused):
    options = dict(
        platform="gpu", within_program=any(len(p.members) > 1 for p in fused.bundle.schedule if hasattr(p, "members"))
    )
    assert html_page(coalesce.fuse(mix(), **options)) == html_page(fused)


def test_what_a_user_names_is_escaped():
    name = """<b onclick="x">&amp;'$title"""
    text = html_page(
        coalesce.fuse([coalesce.trace(ranker, {"a": f32((4, 8)), "b": f32((8, 2))}, f32((1, 4)), name=name)])
    )
    assert "<b onclick" not in text
    assert "&lt;b onclick=&quot;x&quot;&gt;&amp;amp;&#x27;$title" in text
    Page(text)


def test_sixteen_resnets_are_one_small_column():
    model = by_name("resnet50")
    params = jax.eval_shape(model.init, jax.random.key(0))

    def page(tenants):
        return html_page(
            coalesce.fuse(
                [coalesce.trace(model.apply, params, *model.inputs(), name=f"resnet {i}") for i in range(tenants)]
            )
        )

    text = page(16)
    assert len(Page(text).equations(0, "heavy")) == 54
    assert len(text) < 200_000
    assert len(text) - len(page(8)) < 2_000, "a tenant more costs its name"
