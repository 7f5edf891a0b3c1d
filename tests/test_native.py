"""What the policy thinks with, compiled by mypyc: it decides the same, and passes the same tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coalesce.scheduler.native import is_native
from tests.test_scheduler_fuzz import simulated

pytestmark = [pytest.mark.once, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent
FOLDERS = ("coalesce", "passes", "scheduler", "models", "tests", "experiments")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
SEEDS = 200

RUNS = f"""
from coalesce.scheduler.native import is_native
from tests.test_scheduler_fuzz import simulated

assert is_native()
for seed in range({SEEDS}):
    print(simulated(seed))
"""


def copied(folder: Path) -> Path:
    left_out = shutil.ignore_patterns("__pycache__", "results", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkout, with what was compiled in place."""
    assert not is_native(), "it is compared with the sources, which `make clean` brings back"
    folder = copied(tmp_path_factory.mktemp("native"))
    run(folder, "setup.py", "--quiet", "build_ext", "--inplace", COALESCE_MYPYC="1")
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_mypyc_takes_it(tmp_path):
    """All that it does before a C compiler."""
    run(copied(tmp_path), "setup.py", "--quiet", "--version", COALESCE_MYPYC="1")
    assert len(list((tmp_path / "build").rglob("*.c"))) > 10


@pytest.mark.slow
def test_it_decides_the_same(copy):
    told = run(copy, "-c", RUNS, PYTHONPATH=str(copy)).splitlines()
    assert len(told) == SEEDS
    for seed, line in enumerate(told):
        assert line == str(simulated(seed)), f"seed {seed}"


@pytest.mark.slow
def test_it_passes_the_same_tests(copy):
    """But for those that look inside of it, or copy it."""
    names = [f"tests/test_{name}*.py" for name in ("policy", "scheduler", "baselines", "runtime")]
    files = [str(path.relative_to(copy)) for name in names for path in sorted(copy.glob(name))]
    assert len(files) > 10
    said = run(copy, "-m", "pytest", "-q", "--native", "-p", "no:cacheprovider", *files)
    assert " passed" in said
