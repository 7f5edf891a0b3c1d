"""What tests/annotations.py has checked as the others run is checked: functions, methods and what dataclasses hold."""

import inspect
import random
from typing import Any

import pytest
from beartype.roar import BeartypeCallHintViolation

from coalesce.bank import places_by_tenant
from coalesce.costs import Costs, device_of
from coalesce.runtime.reply import Reply, Server
from coalesce.slab import Slab
from tests.annotations import check_again, FIRST

pytestmark = pytest.mark.once
WRONG: Any = 3


def test_a_call_that_breaks_an_annotation_is_an_error():
    with pytest.raises(BeartypeCallHintViolation, match="places_by_tenant.* arrays=3 "):
        places_by_tenant(WRONG)


def test_so_is_one_of_a_method():
    with pytest.raises(BeartypeCallHintViolation):
        Costs(device_of("cpu")).move(str(WRONG))  # pyright: ignore[reportArgumentType]


def test_so_is_a_dataclass_that_holds_something_else():
    with pytest.raises(BeartypeCallHintViolation, match=r"Slab.__init__.* size='3' "):
        Slab((0,), (0,), size=str(WRONG))  # pyright: ignore[reportArgumentType]


def test_the_first_calls_of_each_test_are_checked():
    for _ in range(FIRST):
        places_by_tenant([])
    with pytest.raises(TypeError, match="not iterable"):
        places_by_tenant(WRONG)
    check_again()  # as before each test
    test_a_call_that_breaks_an_annotation_is_an_error()


def test_a_function_looks_as_it_is_written():
    assert list(inspect.signature(places_by_tenant).parameters) == ["arrays"]
    assert str(places_by_tenant.__code__.co_filename).endswith("bank.py")


class Nobody(Server):
    """Serves nothing."""

    def withdraw(self, request: int) -> None: ...
    def call_back(self, callback: Any, reply: Any) -> None: ...
    def call_all_back(self, replies: Any) -> None: ...


def test_the_frames_of_what_is_checked_can_be_looked_at():
    """As pytest does when a test fails, also of a method that says `super()`: its class is a variable of the frame."""
    with pytest.raises(TimeoutError) as caught:
        Reply(0, Nobody()).result(0)
    found = {entry.name: entry.locals for entry in caught.traceback}
    assert Reply.result.__code__.co_freevars == ("__class__",) and "timeout" in found["result"]


def test_checking_draws_nothing_where_others_draw():
    before = random.getstate()
    assert places_by_tenant([]) == {} and Costs(device_of("cpu")).stack([4] * 100, 400) >= 0
    assert random.getstate() == before
