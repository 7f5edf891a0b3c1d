"""Which annotations are checked as the tests run: those of all functions but the ones that are defined inside another.

These would be wrapped anew whenever that one is called, at two milliseconds each: a quarter of the tests' time.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    return function if "<locals>" in function.__qualname__ else beartype(function)
