"""What the policy thinks with, compiled by mypyc: it decides the same, and passes the same tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_scheduler_fuzz import simulated

pytestmark = [pytest.mark.slow, pytest.mark.once]

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


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkout, with what was compiled in place."""
    folder = tmp_path_factory.mktemp("native")
    left_out = shutil.ignore_patterns("__pycache__", "results", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=left_out)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    run(folder, "setup.py", "--quiet", "build_ext", "--inplace", COALESCE_MYPYC="1")
    return folder


def run(folder: Path, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_decides_the_same(copy):
    told = run(copy, "-c", RUNS, PYTHONPATH=str(copy)).splitlines()
    assert len(told) == SEEDS
    for seed, line in enumerate(told):
        assert line == str(simulated(seed)), f"seed {seed}"


def test_it_passes_the_same_tests(copy):
    """But for those that look inside of it, or copy it."""
    found = [path for name in ("policy", "scheduler", "runtime") for path in (copy / "tests").glob(f"test_{name}*.py")]
    files = [str(path.relative_to(copy)) for path in sorted(found)]
    assert len(files) > 10
    said = run(copy, "-m", "pytest", "-q", "--native", "-p", "no:cacheprovider", *files)
    assert " passed" in said
