"""What the user sets of the process while something is made stays: only what we have set is taken back."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from coalesce.runtime.gil import EAGER_S, handing_on
from coalesce.runtime.persistence import keeping, OPTION

pytestmark = pytest.mark.once
KEEPS_ALL = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def cache() -> Iterator[None]:
    assert getattr(jax.config, OPTION) is None
    least_s = getattr(jax.config, KEEPS_ALL)
    jax.config.update(KEEPS_ALL, 0.0)
    yield
    jax.config.update(OPTION, None)
    jax.config.update(KEEPS_ALL, least_s)
    compilation_cache.reset_cache()


def test_a_folder_that_jax_is_given_while_something_is_made_is_kept_and_used(cache, tmp_path: Path):
    ours, own = tmp_path / "ours", tmp_path / "own"
    with keeping(ours):
        with keeping(tmp_path / "of another runtime"):
            jax.jit(lambda x: x + 1).lower(jnp.ones(3)).compile()
        jax.config.update(OPTION, str(own))
    assert getattr(jax.config, OPTION) == str(own)
    jax.jit(lambda x: x + 2).lower(jnp.ones(3)).compile()
    assert list(own.iterdir()) and {path.name for path in tmp_path.iterdir()} == {"ours", "own"}
    jax.config.update(OPTION, None)
    with keeping(ours):
        assert getattr(jax.config, OPTION) == str(ours)
    assert getattr(jax.config, OPTION) is None


def test_a_switch_interval_that_is_set_while_something_is_made_is_kept():
    usual = sys.getswitchinterval()
    try:
        with handing_on(), handing_on():
            sys.setswitchinterval(0.25)
        assert sys.getswitchinterval() == 0.25
        with handing_on():
            assert sys.getswitchinterval() == pytest.approx(EAGER_S)
        assert sys.getswitchinterval() == 0.25
    finally:
        sys.setswitchinterval(usual)


def test_a_profiler_that_is_set_while_something_is_made_is_kept(monkeypatch):
    def own(*_: Any) -> None:
        pass

    monkeypatch.setattr(handing_on, "_served_s", float("inf"))
    try:
        with handing_on():
            assert sys.getprofile() is not None
            sys.setprofile(own)
        assert sys.getprofile() is own
    finally:
        sys.setprofile(None)
