"""The documents say what is: their examples print what they show, and what they name is there.

    pytest tests/test_readme.py --update-golden         write into the documents what their examples print now

Examples run under JAX's own promotion rules, as they do where a reader pastes them.
"""

from __future__ import annotations

import doctest
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from coalesce.costs import Costs, device_of
from coalesce.kernels import KERNELS
from coalesce.passes.bundle_pipeline import bundle_passes, serving_passes
from coalesce.passes.pipeline import PROGRAM_PASSES

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
ARCHITECTURE = ROOT / "docs" / "architecture.md"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def prose(text: str) -> str:
    """A document without its code blocks."""
    return FENCED.sub("", text)


# ---- examples ------------------------------------------------------------------------------------------------------


class Runner(doctest.DocTestRunner):
    """Runs examples, in which "..." stands for any text, and keeps what those printed that printed something else."""

    def __init__(self) -> None:
        super().__init__(verbose=False, optionflags=doctest.ELLIPSIS)
        self.printed: list[tuple[doctest.Example, str]] = []

    def report_failure(self, out: Any, test: doctest.DocTest, example: doctest.Example, got: str) -> None:
        self.printed.append((example, got))
        super().report_failure(out, test, example, got)


def examples(document: Path) -> doctest.DocTest:
    """Everything in ```pycon blocks, as one session. The rest is blanked, so that line numbers are the document's."""
    text, kept = document.read_text(encoding="utf-8"), []
    start = 0
    for block in FENCED.finditer(text):
        if block[1] == "pycon":
            kept += ["\n" * text.count("\n", start, block.start(2)), block[2]]
            start = block.end(2)
    return doctest.DocTestParser().get_doctest("".join(kept), {}, document.name, str(document), 0)


def write_printed(document: Path, runner: Runner) -> None:
    lines = document.read_text(encoding="utf-8").splitlines(keepends=True)
    for example, got in reversed(runner.printed):
        start = example.lineno + example.source.count("\n")
        lines[start : start + example.want.count("\n")] = got.splitlines(keepends=True)
    document.write_text("".join(lines), encoding="utf-8")


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if "```pycon" in d.read_text(encoding="utf-8")], ids=name_of)
def test_examples_print_what_they_show(document: Path, request: pytest.FixtureRequest) -> None:
    runner, report = Runner(), []
    result = runner.run(examples(document), out=report.append)
    if request.config.getoption("--update-golden"):
        write_printed(document, runner)
    assert result.attempted and not result.failed, "".join(report)


# ---- names ---------------------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """The anchors that a code host gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text(encoding="utf-8")))
    broken = []
    for target in (t for t in targets if not t.startswith(("https://", "http://"))):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def test_files_named_in_architecture_exist() -> None:
    """Every `path/to/file.py` and `folder/` in backticks, from the root of the repository."""
    named = re.findall(r"`([\w./-]+(?:\.(?:py|html|toml|md)|/))`", prose(ARCHITECTURE.read_text(encoding="utf-8")))
    assert len(named) > 20
    assert [name for name in dict.fromkeys(named) if not (ROOT / name).exists()] == []


def first_column(heading: str) -> list[str]:
    """The names in the first column of the table under a heading of architecture.md."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]


def test_passes_in_architecture_are_the_pipelines() -> None:
    costs = Costs(device_of("cpu"))
    fused = names([*PROGRAM_PASSES, *bundle_passes(platform="cpu", costs=costs, launches=True)])
    served = names(serving_passes(held=(), platform="cpu", costs=costs))
    shown = first_column("Passes")
    assert [name for name in shown if name in fused] == fused
    assert [name for name in shown[len(PROGRAM_PASSES) :] if name in served] == served


def names(passes: Sequence[Any]) -> list[str]:
    return [getattr(run, "func", run).__name__ for run in passes]


def test_kernels_in_architecture_are_the_librarys() -> None:
    assert first_column("Kernels") == list(KERNELS)


def test_layers_in_architecture_are_the_linters() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = pyproject["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert first_column("Layers") == [name for layer in layers for name in re.findall(r"\w+", layer)]
