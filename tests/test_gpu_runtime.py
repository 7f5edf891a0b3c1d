"""The runtime on an NVIDIA GPU, with programs whole and in segments. Skipped elsewhere; run with `pytest -m gpu`."""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
import pytest

from coalesce.models import by_name
from coalesce.runtime.runtime import Runtime
from coalesce.runtime.second import WANTED
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Want
from tests.runtime_body import check_served, Kind, kinds_of, pools_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),  # by JAX 0.11 and newer
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]

SMALL = {"resnet18": {"image_size": 64}, "bert_small": {}, "lstm": {}, "mlp": {}}


@pytest.fixture(autouse=True, scope="module")
def highest():
    """So that results are those of each tenant alone but for the order of sums."""
    with jax.default_matmul_precision("highest"):
        yield


def kinds(*names: str) -> list[Kind]:
    return kinds_of([by_name(name, **SMALL[name]) for name in names], tenants=3)


@pytest.mark.parametrize("segments", [1, 3])
def test_every_tenant_gets_what_it_gets_alone(segments):
    with Runtime(widths=(1, 2, 4), segments=segments, compiled=False) as rt:
        found = kinds(*SMALL)
        check_served(rt, found, requests=96)
        cut = [pool for kind in found for pool in pools_of(rt, kind) if pool is not None]
        assert len(cut) == (len(SMALL) if segments > 1 else 0)


def test_pools_stay_where_they_are():
    """Registers are donated, and changed in place."""
    with Runtime(widths=(1, 2, 4), segments=3, compiled=False) as rt:
        (kind,) = kinds("resnet18")
        check_served(rt, [kind], requests=12)
        (pool,) = pools_of(rt, kind)
        assert pool is not None
        places = [x.unsafe_buffer_pointer() for x in pool.registers]
        check_served(rt, [kind], requests=60, add=False)
        assert [x.unsafe_buffer_pointer() for x in pool.registers] == places


@pytest.mark.parametrize("segments", [1, 3])
def test_families_share_an_executable(segments, monkeypatch):
    """Each at a segment of its own; whether that wins is not asked here."""
    with Runtime(widths=(1, 2, 4), segments=segments, compiled=False) as rt:
        found = kinds("mlp", "bert_small")
        check_served(rt, found, requests=8)
        station = rt._stations[0]
        monkeypatch.setattr(station.device, "apart_ns", lambda entries: None)
        entries = (Entry(0, segments - 1, 2), Entry(1, 0, 2))
        station.foundry.want(Want(entries))
        rt.warm_up(600.0)
        assert [e.entries for e in station.device.catalog.mixed] == [entries]
        check_served(rt, found, requests=64, add=False)


def test_newcomers_are_compiled_in_another_process_to_what_runs_in_this_one(monkeypatch, caplog):
    monkeypatch.setenv(WANTED, "1")
    with caplog.at_level(logging.DEBUG, "coalesce.runtime"), Runtime(widths=(1, 2, 4), compiled=False) as rt:
        first, *newcomers = kinds("mlp", "bert_small")
        check_served(rt, [first], requests=8)
        apart = rt._process.apart
        assert apart._process is None  # nobody was served meanwhile
        check_served(rt, newcomers, requests=64)
        rt.warm_up(600.0)
        check_served(rt, newcomers, requests=64, add=False)
        assert apart._process is not None and not apart._is_useless
    assert "where it is served" not in caplog.text


def test_nan_of_one_tenant_stays_there():
    with Runtime(widths=(1, 2, 4), segments=3, compiled=False) as rt:
        (kind,) = kinds("bert_small")
        check_served(rt, [kind], requests=6)
        bad: Any = jax.tree.map(lambda w: np.full_like(np.asarray(w), np.nan), kind.params[2])
        rt.update_tenant(kind.name(2), bad)
        replies = [rt.submit(kind.name(i % 3), *kind.inputs[i % 3]) for i in range(24)]
        for i, reply in enumerate(replies):
            finite = all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(reply.result(60)))
            assert finite == (i % 3 != 2)
