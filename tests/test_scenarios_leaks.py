"""Memory stays where it is, however many requests were served; and a leak would be found."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

MOST = 20_000_000  # bytes
SMALL, FULL = 20_000, 1_000_000


def grown(count: int, segments: int, *kinds: str) -> int:
    """Bytes, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.endless", str(count), str(segments), *kinds],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(("count", "segments"), [(SMALL, 1), (SMALL // 2, 3)])
def test_requests_leave_nothing_behind(count, segments):
    assert grown(count, segments) < MOST


def test_a_leak_is_detected():
    assert grown(SMALL // 2, 1, "leak") > MOST


@pytest.mark.soak
@pytest.mark.parametrize("segments", [1, 3])
def test_a_million_requests_of_real_programs_leave_nothing_behind(segments):
    assert grown(FULL, segments, "jax") < MOST
