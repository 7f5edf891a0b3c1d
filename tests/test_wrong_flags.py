"""What an experiment is given and does not know it refuses, before it measures anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import newcomer
from experiments.own_flags import counts_of, fields_of

FOLDER = Path(__file__).parent.parent / "experiments"
SCRIPTS = [path.stem for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text()]

pytestmark = pytest.mark.once


def test_fields_and_counts_are_read():
    assert fields_of(["width=64", "", "sizes=(1,)"]) == {"width": 64, "sizes": (1,)}
    assert counts_of(["1", "16"]) == [1, 16]


@pytest.mark.parametrize("wrong", ["width", "width=wide", "width="])
def test_what_is_no_field(wrong):
    with pytest.raises(SystemExit, match=f"what is layers=2,{wrong}. A field is set as in width=64"):
        fields_of(["layers=2", wrong])


@pytest.mark.parametrize("wrong", ["x", "0", "-1", "1.5"])
def test_what_is_no_count(wrong):
    with pytest.raises(SystemExit, match=f"what is {wrong}. A number of at least 1"):
        counts_of(["4", wrong])


def test_a_field_that_varies_is_one_of_those_given(tmp_path):
    with pytest.raises(SystemExit, match="what is width. --vary is one of --fields"):
        newcomer.main(["--fields=layers=2", "--vary=width", "--turns=1", f"--out={tmp_path}"])


@pytest.mark.slow
@pytest.mark.parametrize("stray", ["stray", "--stray"])
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "peers_worker"])  # which others start
def test_what_is_stray_is_refused(script, stray):
    command = [sys.executable, "-m", f"experiments.{script}", stray]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=FOLDER.parent, env=env, capture_output=True, text=True, timeout=120)
    told = done.stdout + done.stderr
    assert done.returncode and "stray" in told and "Traceback" not in told
