"""What all tests share: strict arithmetic, golden texts and the hypothesis profiles.

pytest --update-golden                      rewrite tests/golden/; read the diff before committing it
pytest --unchecked                          without the annotations checked
pytest --numbers 1                          other random numbers in all arrays (default: 0)
pytest --native                             what `make native` has compiled of the policy, instead of its sources
pytest --xla own                            compile as XLA does unless told otherwise (default: cheaply, see below)
pytest --hypothesis-profile quick           20 examples a property, as on the second interpreter (default: 80; the same
                                            ones in every run; soak: 2000, others in every run)
"""

import gc
import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

# Read when keras is first imported; its own folder, so that no user's keras.json changes a test.
os.environ["KERAS_BACKEND"] = "jax"
os.environ["KERAS_HOME"] = str(Path(__file__).parent.parent / ".cache" / "keras")

# A file that is not there: what the user of this machine tuned changes no test.
os.environ["COALESCE_TUNED"] = str(Path(__file__).parent.parent / ".cache" / "tuned.json")
os.environ["COALESCE_APART"] = "0"  # a process for each of them would take longer than what it compiles
os.environ["COALESCE_COMPILED"] = ""  # nor does what is compiled here find its way there, or back

import jax
import pytest
from hypothesis import settings

from tests.annotations import check_again, check_all
from tests.random_numbers import NUMBERS

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("default", max_examples=80, deadline=None, print_blob=True, derandomize=True)
settings.register_profile("quick", settings.get_profile("default"), max_examples=20)
settings.register_profile("soak", settings.get_profile("default"), max_examples=2000, derandomize=False)
settings.load_profile("default")

GOLDEN = Path(__file__).parent / "golden"
FIRST = ("test_equivalence", "test_across", "test_scheduler_scenarios", "test_models", "test_counts", "test_kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
    parser.addoption("--numbers", type=int, default=0, help="which random numbers the arrays of all tests hold")
    parser.addoption("--unchecked", action="store_true", help="do not check annotations as the tests run")
    parser.addoption("--native", action="store_true", help="test what mypyc has compiled of the policy")
    parser.addoption("--xla", choices=("cheap", "own"), default="cheap", help="how XLA compiles: cheaply, or as usual")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()
    NUMBERS.variant = int(config.getoption("--numbers") or 0)
    if not config.getoption("--unchecked"):
        check_all("coalesce")
    check_native(bool(config.getoption("--native")))
    if config.getoption("--xla") == "cheap" and metadata.version("jaxlib").startswith("0.10."):
        # Read when the first program is compiled. 0.12 does not know the first, and what is not known ends the process.
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"  # a third of the time
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def check_native(asked: bool) -> None:
    """So that nobody tests sources, and runs what was compiled of others. Imported after `check_all`."""
    from coalesce.scheduler.native import is_native, stale

    if is_native() and not asked:
        raise pytest.UsageError("mypyc has compiled parts of scheduler/; `make clean`, or test these with --native")
    if asked and not is_native():
        raise pytest.UsageError("nothing of scheduler/ is compiled, which `make native` does")
    if stale():
        raise pytest.UsageError(f"compiled of other sources: {', '.join(stale())}; `make native` does it again")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--native"):
        for item in items:
            if item.get_closest_marker("inside"):
                item.add_marker(pytest.mark.skip(reason="looks inside of what was compiled, or copies it"))
    # The longest first: workers, each of which takes whole files, end together.
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and jax.default_backend() != "gpu":
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
    if config.getoption("--xla") == "cheap" and jax.default_backend() == "cpu":
        compile_cheaply()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    check_again()
    NUMBERS.begin(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    with NUMBERS.apart(f"{fixturedef.baseid} {fixturedef.argname} {getattr(request, 'param', '')}"):
        return (yield)


def pytest_collection_finish() -> None:
    """What was imported stays, and nothing is gained by looking at it again; JAX makes and drops so much as it traces
    that a tenth of the time went into looking for garbage."""
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True, scope="module")
def set_aside() -> Iterator[None]:
    """Nor at what earlier files left with JAX: tests that ask for a collection waited a second for each."""
    yield
    gc.collect()
    gc.freeze()


def compile_cheaply() -> None:
    """Compiling is most of what the tests take. XLA's passes over a program decide what is computed, and stay as they
    are; what makes machine code of it does so in a hurry, in the processes that tests start too."""
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """JAX's own rules, for tests that run code of keras or optax: both promote dtypes and ranks implicitly."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[object], None]:
    """`golden(text)` compares with tests/golden/<test file>/<test name>.txt. One text a test."""
    name = re.sub(r"[^\w.-]+", "_", request.node.name).strip("_")
    path = GOLDEN / request.path.stem / f"{name}.txt"

    def compare(text: object) -> None:
        actual = f"{text}\n"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(actual, encoding="utf-8")
        assert path.exists(), f"no golden file {path}; run pytest --update-golden and read what it wrote"
        assert actual == path.read_text(encoding="utf-8"), "if the change is meant: pytest --update-golden"

    return compare
