"""Eight tenants, three families, one fused program: `make demo`.

Trains eight small classifiers of scanned digits, traces and fuses them, and compares the fused program with the tenants
alone: answers, heavy operations and time. Exits with 1 if a fused tenant is less accurate, or more, than it is alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import coalesce
from experiments import digits
from experiments.digits import Params, Split, Tenant
from experiments.measure import interleave, Timing
from experiments.results import device_name

Round = Callable[[Sequence[tuple[jax.Array]]], list[Any]]  # inputs of each tenant -> logits of each; `Fused` is one


def trained(console: Console, tenants: Sequence[Tenant], data: Split, steps: int) -> list[Params]:
    """Each tenant's parameters, with a bar for each while they are learnt."""
    columns = (TextColumn("  {task.description:8}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(tenant.name, total=steps, start=False) for tenant in tenants]
        found = []
        for tenant, bar in zip(tenants, bars, strict=True):
            progress.start_task(bar)
            found.append(digits.train(tenant, data, steps, partial(progress.advance, bar)))
    return found


def one_by_one(tenants: Sequence[Tenant], weights: Sequence[Params], example: jax.Array) -> Round:
    """An ahead-of-time executable for each tenant, called in turn; a round waits for nothing in between."""

    def executable(tenant: Tenant, params: Params) -> Callable[..., jax.Array]:
        leaves, tree = jax.tree.flatten(params)  # flat arguments are cheaper to pass on each call than nested dicts
        call = jax.jit(lambda leaves, image: tenant.apply(tree.unflatten(leaves), image))
        return partial(call.lower(leaves, example).compile(), leaves)

    calls = [executable(*both) for both in zip(tenants, weights, strict=True)]
    return lambda requests: [call(*inputs) for call, inputs in zip(calls, requests, strict=True)]


def answers(run: Round, images: np.ndarray, tenants: int) -> np.ndarray:
    """[image, tenant]: the digit that each tenant takes each image for. In round i tenant t sees image i + t, so that
    no two tenants have the same input."""
    requests = [(jax.device_put(image[None]),) for image in images]
    rounds = [[requests[(i + t) % len(requests)] for t in range(tenants)] for i in range(len(requests))]
    seen = np.stack([[np.argmax(logits) for logits in run(inputs)] for inputs in rounds])
    return np.stack([np.roll(seen[:, t], t) for t in range(tenants)], axis=1)


def accuracy_table(tenants: Sequence[Tenant], data: Split, alone: np.ndarray, together: np.ndarray) -> Table:
    table = Table()
    for name in ("tenant", "network", "trained on", "alone", "fused", "answers that differ"):
        table.add_column(name, justify="left" if name in ("tenant", "network") else "right")
    for i, tenant in enumerate(tenants):
        before, after = (f"{np.mean(x[:, i] == data.labels):.2%}" for x in (alone, together))
        differ = np.sum(alone[:, i] != together[:, i])
        table.add_row(tenant.name, type(tenant.network).__name__, str(tenant.images), before, after, str(differ))
    return table


def heavy_table(report: coalesce.Report) -> Table:
    table = Table()
    for name in ("", "before", "fused"):
        table.add_column(name, justify="left" if not name else "right")
    for family in range(report.families):
        lanes = [tenant for tenant in report.tenants if tenant.family == family]
        table.add_row(
            ", ".join(tenant.name for tenant in lanes),
            " + ".join(str(tenant.heavy_ops) for tenant in lanes),
            str(lanes[0].superkernels + sum(tenant.alone for tenant in lanes)),
        )
    table.add_section()
    table.add_row("all", str(report.heavy_ops), str(report.superkernels + report.alone))
    return table


def time_table(timings: dict[str, Timing]) -> Table:
    table = Table()
    for name in ("", "median", "p10 to p90"):
        table.add_column(name, justify="left" if not name else "right")
    for name, timing in timings.items():
        table.add_row(name, f"{timing.median:,.0f} us", f"{timing.p10:,.0f} to {timing.p90:,.0f} us")
    return table


def superkernel(explained: str) -> str:
    """The first pack of a loop's body, with the operation of the program that it stands for."""
    lines = explained[explained.index("# superkernels") :].splitlines()[1:]
    return next(line for line in lines if ".body." in line)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="train for a few steps only, on fewer scans to read")
    quick = parser.parse_args(arguments).quick
    console = Console(highlight=False)
    tenants = digits.tenants()
    data, held_out = digits.load()
    if quick:
        held_out = Split(held_out.images[:40], held_out.labels[:40])

    console.print(f"[bold]1. Train[/bold] {len(tenants)} tenants on scanned digits, each on its own share of them")
    weights = trained(console, tenants, data, steps=20 if quick else 300)

    console.print("\n[bold]2. Fuse[/bold] their inference programs into one")
    image = jax.device_put(held_out.images[:1])
    with console.status("  tracing, fusing and compiling"):
        pairs = zip(tenants, weights, strict=True)
        programs = [coalesce.trace(tenant.apply, params, image, name=tenant.name) for tenant, params in pairs]
        fused = coalesce.fuse(programs)
        fused.compile()
        alone = one_by_one(tenants, weights, image)
    console.print("\nHeavy operations, that is matrix products and convolutions:", heavy_table(fused.report))
    console.print("The step of all LSTMs is one of them; fused.explain() says of it:")
    console.print(f"  {superkernel(fused.explain())}", markup=False, soft_wrap=True)

    console.print("\n[bold]3. Serve[/bold] with the fused program, and with an executable for each tenant")
    with console.status("  reading the held-out scans"):
        before, after = (answers(run, held_out.images, len(tenants)) for run in (alone, fused))
    console.print(f"\nAccuracy on {len(held_out.labels)} held-out scans:")
    console.print(accuracy_table(tenants, held_out, before, after))
    with console.status("  timing both in turns"):
        requests = [(jax.device_put(scan[None]),) for scan in held_out.images[: len(tenants)]]
        rounds = {"one by one": partial(alone, requests), "fused": partial(fused, requests)}
        timings = interleave(rounds, repeats=20 if quick else 1000, seconds=10)
    ratio = timings["one by one"].median / timings["fused"].median
    console.print(f"Time of a round, one scan for each tenant, on a {device_name()}:", time_table(timings))
    console.print(f"One by one takes {ratio:.1f} times as long as fused.")

    console.print("\n[bold]Read on[/bold]")
    console.print("  README.md                               your own tenants")
    console.print("  docs/architecture.md                    how it works")
    console.print("  python -m experiments.tenant_scaling    more tenants, larger models")
    accuracy = [np.mean(x == held_out.labels[:, None], axis=0) for x in (before, after)]
    if not np.array_equal(*accuracy):
        console.print("[red]A fused tenant is not as accurate as it is alone. That is a bug; please report it.[/red]")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
