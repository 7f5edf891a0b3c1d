"""`tune` with processes that compile at once."""

from collections.abc import Sequence

import pytest

from coalesce.measuring.tune import at_once, Task
from coalesce.program import Program


def never() -> Sequence[Program]:
    raise AssertionError("begun though it is late")


@pytest.mark.once
@pytest.mark.timeout(120)  # Python's pool hangs if it is shut down while processes of one task each are to be replaced
def test_it_ends_where_there_is_no_time_left():
    tasks = [Task(number, (), False, None) for number in range(4)]
    assert list(at_once(never, tasks, until=0.0, workers=1)) == []
