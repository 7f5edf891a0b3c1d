"""What compiling costs before XLA: tracing, passes and lowering, by number of tenants.

    python -m experiments.compile_cost --model=resnet50 --tenants=1,4,16,64

Params are ShapeDtypeStructs, so that nothing is allocated and nothing is compiled. Two cases: tenants of one function,
whose trace and passes JAX and the compiler share, and tenants that each bring a function of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter

import jax
from absl import app, flags

import coalesce
from coalesce.models import by_name, Model, NAMES
from experiments.list_flags import define_counts
from experiments.results import device_folder, device_name, header, Row, save_rows, table, writable

MODEL = flags.DEFINE_enum("model", "resnet50", NAMES, "model of coalesce.models")
REPEATS = flags.DEFINE_integer("repeats", 3, "runs of each cell; the fastest counts", lower_bound=1)
TENANTS = define_counts("tenants", [1, 4, 16, 64], "numbers of tenants")
OUT = flags.DEFINE_string("out", None, "folder for the JSON; default experiments/results/<device>")


def measure(model: Model, tenants: int, own_functions: bool) -> dict[str, float]:
    """Seconds of each stage, from empty tracing caches."""
    jax.clear_caches()
    params, inputs = jax.eval_shape(model.init, jax.random.key(0)), model.inputs(1)

    def own(index: int):
        return lambda p, *x: model.apply(p, *x)

    start = perf_counter()
    fns = [own(i) if own_functions else model.apply for i in range(tenants)]
    programs = [coalesce.trace(fn, params, *inputs, name=f"tenant {i}") for i, fn in enumerate(fns)]
    traced = perf_counter()
    fused = coalesce.fuse(programs)
    planned = perf_counter()
    fused.lower()
    lowered = perf_counter()
    return {"trace_s": traced - start, "passes_s": planned - traced, "lower_s": lowered - planned}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    folder = writable(Path(OUT.value or Path(__file__).parent / "results" / device_folder()))
    model = by_name(MODEL.value)
    rows: list[Row] = []
    for own_functions in (False, True):
        for tenants in TENANTS.value:
            runs = [measure(model, tenants, own_functions) for _ in range(REPEATS.value)]
            best = min(runs, key=lambda run: sum(run.values()))
            rows.append({"model": model.name, "tenants": tenants, "own_functions": own_functions, **best})
            print(f"{model.name} x{tenants}, own functions {own_functions}: {sum(best.values()):.2f} s", flush=True)
    columns = ["functions", "tenants", "trace s", "passes s", "lower s", "sum s"]
    lines = []
    for row in rows:
        stages = [row[k] for k in ("trace_s", "passes_s", "lower_s")]
        name = "one a tenant" if row["own_functions"] else "one for all"
        lines.append([name, str(row["tenants"]), *(f"{s:.2f}" for s in [*stages, sum(stages)])])
    print(table(columns, lines))
    head = header(" ".join(["python -m experiments.compile_cost", *sys.argv[1:]]), device_name(), repeats=REPEATS.value)
    path = folder / f"compile_cost_{model.name}.json"
    save_rows(path, head, rows)
    print(path)


if __name__ == "__main__":
    app.run(main)
