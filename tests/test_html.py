"""The page of `python -m coalesce inspect --html`: what stands on it, and that it stands on its own."""

import html
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import coalesce
from coalesce.heavy import heavy_eqns
from coalesce.html import html_page
from coalesce.models import by_name


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
    assert "test_html.py:" in facts["source"] and "(vision)" in facts["source"]
    assert re.fullmatch(r"%\d+:f32\[1,8\], %\d+:f32\[8,4\] \(weight\)", facts["operands"])
    assert facts["pack"].endswith("a superkernel of 4 lanes")
    assert facts["kernel"] == "batched_matvec"
    assert facts["members"].startswith("family 0 at ") and facts["padding"] == "none"
    assert facts["weights"].endswith("4 rows of float32[4, 8]")


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
    assert f"<title>Coalesce: {html.escape(str(report))}</title>" in text


def test_page_is_the_same_for_the_same_programs():
    assert html_page(coalesce.fuse(mix())) == html_page(coalesce.fuse(mix()))


def test_what_a_user_names_is_escaped():
    name = """<b onclick="x">&amp;'$title"""
    text = html_page(
        coalesce.fuse([coalesce.trace(ranker, {"a": f32((4, 8)), "b": f32((8, 2))}, f32((1, 4)), name=name)])
    )
    assert "<b onclick" not in text
    assert "&lt;b onclick=&quot;x&quot;&gt;&amp;amp;&#x27;$title" in text
    Page(text)


def tower(layers, x):
    for layer in layers:
        x = jax.nn.relu(x @ layer)
    return x


def test_a_superkernel_across_programs_stands_in_the_column_of_each():
    """One colour and one number in both, and each member links to the other; its decision is among its facts."""
    sizes = {"small": (8, 14, 4), "large": (8, 16, 4)}
    towers = [
        coalesce.trace(tower, [f32(s) for s in zip(n, n[1:], strict=False)], f32((2, 8)), name=name)
        for name, n in sizes.items()
    ]
    fused = coalesce.fuse(towers, policy="always")
    text, page = html_page(fused), Page(html_page(fused))
    assert fused.report.superkernels_across == 2 and "<dt>across families</dt><dd>2</dd>" in text
    left, right = ({row["data-pack"]: row for row in page.equations(f, "heavy")} for f in (0, 1))
    assert len(left) == 2 and left.keys() == right.keys()
    for number, row in left.items():
        other = right[number]
        assert row["style"] == other["style"] and "--hue" in row["style"]
        assert "\nfamily 0 at " in row["title"] and ": with family 1 at " in row["title"]
        members = next(line for line in row["title"].split("\n") if line.startswith("members: "))
        assert "(small)" in members and "(large)" in members and members in other["title"]
    never = coalesce.fuse(towers, policy="never")
    assert "<dt>across families</dt><dd>0</dd>" in html_page(never) and "side by side" not in html_page(never)
    beside = html_page(coalesce.fuse(towers, platform="gpu", side_by_side=True))
    assert "<dt>families run</dt><dd>side by side</dd>" in beside
    note = 'nothing runs across families with policy="never"'
    assert note in never.explain() and note not in fused.explain()
    assert note not in coalesce.fuse(towers[:1], policy="never").explain()


@pytest.mark.once  # as long as what JAX traces, whichever does
def test_sixteen_resnets_are_one_small_column():
    model = by_name("resnet50")
    program = coalesce.trace(model.apply, jax.eval_shape(model.init, jax.random.key(0)), *model.inputs())

    def page(tenants):
        return html_page(coalesce.fuse([replace(program, name=f"resnet {i}") for i in range(tenants)]))

    text = page(16)
    assert len(Page(text).equations(0, "heavy")) == 54
    assert len(text) < 200_000
    assert len(text) - len(page(8)) < 2_000, "a tenant more costs its name"
