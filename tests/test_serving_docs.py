"""The gRPC servers of the README and of docs/serving.md, as they stand there, with a client; and that page's tables."""

import asyncio
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coalesce.errors import InvalidInput, ServingError
from coalesce.observing.metrics import Metrics
from coalesce.runtime.runtime import Runtime

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "serving.md"
X = np.ones((1, 8), np.float32)


def scorer(w: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    return {"scores": x @ w}


def tagger(w: jax.Array, image: jax.Array) -> dict[str, jax.Array]:
    return {"logits": image.reshape(8, 8) @ w}


@pytest.fixture(scope="module")
def served() -> Iterator[Runtime]:
    with Runtime(widths=(1,)) as rt:
        rt.add_tenant("ads", scorer, jnp.eye(8), example=(X,), slo=30.0)
        rt.add_tenant("pictures", tagger, jnp.eye(8), example=(np.ones((1, 8, 8, 1), np.float32),), slo=30.0)
        yield rt


def server_of(page: Path) -> Any:
    """What the page's server is started with."""
    (source,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(source, str(page), "exec"), names)
    return names["serve"]


@pytest.mark.parametrize(
    ("page", "service", "tenant", "x", "wrong"),
    [
        (PAGE, "demo.Scorer", "ads", X, "pictures"),
        (ROOT / "README.md", "demo.Tagger", "pictures", np.arange(64, dtype=np.float32), "ads"),
    ],
    ids=["serving.md", "README.md"],
)
def test_the_grpc_server_serves_and_says_what_is_wrong(served, page, service, tenant, x, wrong):
    async def main() -> None:
        server, port = await server_of(page)(served, "127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            infer = channel.unary_unary(f"/{service}/Infer")

            async def ask(tenant: str, x: np.ndarray, timeout: float | None) -> Any:
                return await infer(x.tobytes(), metadata=(("tenant", tenant),), timeout=timeout)

            answers = await asyncio.gather(*(ask(tenant, i * x, timeout) for i in range(4) for timeout in (None, 30.0)))
            for i, answer in enumerate(answers):
                np.testing.assert_array_equal(np.frombuffer(answer, np.float32), (i // 2) * x.reshape(-1))
            for name, code in [
                ("nobody", grpc.StatusCode.NOT_FOUND),
                (wrong, grpc.StatusCode.INVALID_ARGUMENT),
            ]:
                with pytest.raises(grpc.aio.AioRpcError, match=name) as caught:
                    await ask(name, x, None)
                assert caught.value.code() is code
        await server.stop(None)

    asyncio.run(main())


def table(heading: str) -> list[str]:
    """The names in the first columns of the tables under a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return [n for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for n in re.findall(r"`([\w.]+)`", row)]


def test_options_of_the_page_are_those_of_the_runtime():
    parameters = [name for name in inspect.signature(Runtime).parameters if name != "clock"]  # which is for tests
    assert sorted(table("Options")) == sorted(parameters)


def test_metrics_of_the_page_are_those_that_are_exported():
    metrics = Metrics()
    with Runtime(widths=(1,), observers=[metrics]) as rt:
        metrics.watch(rt.health)
        rt.add_tenant("ads", scorer, jnp.eye(8), example=(X,), slo=30.0)
        rt.submit("ads", X).result(30)
        exported = {family.name: family for family in text_string_to_metric_families(metrics.text())}
    named = [name for name in table("Metrics, spans, traces, recordings") if not name.startswith("coalesce.")]
    assert sorted(name.removesuffix("_total") for name in named) == sorted(exported)
    assert all((exported[name.removesuffix("_total")].type == "counter") == name.endswith("_total") for name in named)


@pytest.mark.parametrize("error", [InvalidInput, *ServingError.__subclasses__()], ids=lambda error: error.__name__)
def test_status_codes_are_those_of_grpc_and_of_the_page(error):
    assert grpc.StatusCode[error.grpc] is not grpc.StatusCode.OK and 400 <= error.http < 600
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if f"`{error.__name__}`" in line]
    assert any(f"{error.grpc}, {error.http}" in row for row in rows)
