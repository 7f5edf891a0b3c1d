"""The wheel holds all of the library, nothing else, and works where there is no checkout."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("coalesce", "passes", "scheduler", "models")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")

EXAMPLE = """
import sys
site = sys.argv[1]
sys.path.insert(0, site)    # before the checkout, if an editable install has put that on the path

import jax.numpy as jnp
import numpy as np

import coalesce
import coalesce.models
import coalesce.passes
import coalesce.scheduler

for module in (m for name, m in sys.modules.items() if name.split(".")[0] == "coalesce"):
    assert module.__file__.startswith(site), module.__file__

def apply(w, x):
    return jnp.tanh(x @ w)

def tenant(seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((8, 4), np.float32), rng.standard_normal((2, 8), np.float32)

tenants = {name: tenant(seed) for seed, name in enumerate("ab")}
fused = coalesce.fuse([coalesce.trace(apply, w, x, name=name) for name, (w, x) in tenants.items()])
for (w, x), y in zip(tenants.values(), fused([(x,) for _, x in tenants.values()]), strict=True):
    np.testing.assert_allclose(y, apply(w, x), rtol=1e-5)
"""


def run(*command: object, cwd: Path) -> None:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(folder: Path) -> Path:
    """Build from a copy, so that the checkout stays as it is and nothing left over in its build/ gets in."""
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.once  # one wheel is for all
@pytest.mark.wheel
def test_wheel_is_complete_and_works_elsewhere(tmp_path):
    wheel = build_wheel(tmp_path)

    inside = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = {"coalesce/py.typed"} | {f"coalesce/{p.name}" for p in (ROOT / "coalesce").glob("*.html")}
    data |= {f"coalesce/tuning/{p.name}" for p in (ROOT / "coalesce" / "tuning").glob("*.json")}
    library = {f"coalesce/{p.relative_to(ROOT / 'coalesce')}" for p in (ROOT / "coalesce").rglob("*.py")}
    linked = {f"coalesce/{p.relative_to(ROOT)}" for name in FOLDERS[1:] for p in (ROOT / name).rglob("*.py")}
    assert inside == data | library | linked

    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-index", "--no-deps")
    run(*pip, "--target", site, wheel, cwd=elsewhere)
    run(sys.executable, "-I", "-c", EXAMPLE, site, cwd=elsewhere)
