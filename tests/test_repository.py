"""Habits that a linter has no rule for; CONTRIBUTING.md gives the reasons."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ("coalesce", "passes", "scheduler", "models")
LINKS = ("passes", "scheduler", "models")
LONGEST = 300  # lines of a file

# A folder that exists on somebody's machine only. Written so that this line does not find itself.
MACHINE_PATH = re.compile(r"(?<![\w.~/:-])/(?:home|Users|root|work|workspace|mnt|srv|data)/\w")


def library_files() -> list[Path]:
    files = {path for name in LIBRARY for path in (ROOT / name).rglob("*.py")}
    return sorted(path for path in files if not any(parent.is_symlink() for parent in path.parents))


def tracked_files() -> list[Path]:
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_of_the_library_is_long():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in library_files()}
    assert {name: count for name, count in lines.items() if count > LONGEST} == {}


def test_no_file_touches_private_jax():
    users = {str(path.relative_to(ROOT)) for path in library_files() if "jax._src" in path.read_text()}
    assert users == set()


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative_links(name):
    link = ROOT / "coalesce" / name
    assert link.is_symlink(), f"{link} is no link; on Windows: git config core.symlinks true"
    assert link.readlink() == Path("..", name)


def test_every_package_is_listed():
    folders = {path.parent.relative_to(ROOT) for path in library_files() if path.name == "__init__.py"}
    found = {".".join(folder.parts) for folder in folders}
    found = {name if name.split(".")[0] == "coalesce" else f"coalesce.{name}" for name in found}
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert found == set(pyproject["tool"]["setuptools"]["packages"])


def test_every_golden_folder_has_its_test_file():
    folders = {path.name for path in (ROOT / "tests" / "golden").glob("*") if path.is_dir()}
    assert folders <= {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def test_no_tracked_file_names_a_folder_of_one_machine():
    found = []
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []
