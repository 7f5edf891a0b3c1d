"""How near the chosen packing comes to the best one: random instances, against the exact optimum.

    python -m experiments.packing_regret --instances=200

An instance is a set of 2 to 4 programs, one of which at least has branches (experiments/packing_instances.py). The
optimum is found and proven by integer programming (experiments/packing_exact.py; needs ortools). Instances whose
optimum wins nothing do not count, nor those of chains alone, which are packed as well as can be. Beside
`coalesce.packing.align` stand two simple methods, so that one sees what its parts buy: `greedy` joins whatever wins
most at the moment, and `alignment` is the dynamic program alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean, quantiles

from absl import app, flags

from coalesce.packing import align, Problem
from coalesce.packing.graph import Graph
from coalesce.packing.problem import is_schedulable, Pack, value
from coalesce.packing.progressive import align_programs
from coalesce.packing.state import State
from experiments.packing_exact import solve
from experiments.packing_instances import branches, random_problem
from experiments.results import header, Row, save_rows, table, writable

INSTANCES = flags.DEFINE_integer("instances", 200, "instances whose optimum wins something", lower_bound=2)
FIRST_SEED = flags.DEFINE_integer("first_seed", 1, "seed of the first instance; the next has the next")
OUT = flags.DEFINE_string("out", None, "folder for the results; default experiments/results/packing_regret")

NOTHING = 1e-6  # microseconds


def greedy(problem: Problem) -> float:
    """Joins two packs or nodes as long as that wins something, those first that win most."""
    packs: list[Pack] = [(i,) for i in range(len(problem.nodes))]
    won = 0.0
    while True:
        best: list[Pack] | None = None
        for a, b in combinations(packs, 2):
            joined = tuple(sorted(a + b))
            if not legal(problem, joined):
                continue
            others = [p for p in packs if p not in (a, b)]
            chosen = [p for p in [*others, joined] if len(p) > 1]
            now = value(problem, chosen)
            if now > won + NOTHING and is_schedulable(problem, chosen):
                won, best = now, [*others, joined]
        if best is None:
            return won
        packs = best


def legal(problem: Problem, pack: Pack) -> bool:
    nodes = [problem.nodes[i] for i in pack]
    one_kind = len({node.kind for node in nodes}) == 1
    apart = problem.within or len({node.program for node in nodes}) == len(nodes)
    return one_kind and apart and problem.gain(pack) is not None


def alignment(problem: Problem) -> float:
    """Programs aligned one after another by the dynamic program, and nothing else."""
    state = State(Graph(problem))
    align_programs(state)
    return max(0.0, state.value)


METHODS: dict[str, Callable[[Problem], float]] = {
    "align": lambda problem: align(problem).value,
    "greedy": greedy,
    "alignment": alignment,
}


def measure(instances: int, first_seed: int) -> list[Row]:
    rows: list[Row] = []
    seed = first_seed
    while len(rows) < instances:
        problem, own = random_problem(seed), seed
        seed += 1
        if not branches(problem):
            continue
        best = solve(problem)
        if not best.proven:
            raise RuntimeError(f"instance {own}: the optimum was not proven in time")
        if best.value > NOTHING:
            shares = {name: method(problem) / best.value for name, method in METHODS.items()}
            programs = len({node.program for node in problem.nodes})
            rows.append(
                {"seed": own, "programs": programs, "nodes": len(problem.nodes), "optimum_us": best.value, **shares}
            )
            print(f"\r{len(rows)} of {instances}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return rows


def summary(rows: list[Row]) -> str:
    """A line for each method, over all instances and by the number of programs."""
    lines = []
    for name in METHODS:
        for count in ("all", *sorted({row["programs"] for row in rows})):
            shares = [row[name] for row in rows if count in ("all", row["programs"])]
            tenth = quantiles(shares, n=10, method="inclusive")[0] if len(shares) > 1 else shares[0]
            best = sum(share > 1 - 1e-6 for share in shares)
            numbers = [f"{100 * share:.1f}%" for share in (mean(shares), tenth, min(shares))]
            lines.append([name, str(count), str(len(shares)), *numbers, f"{100 * best / len(shares):.0f}%"])
    return table(["method", "programs", "instances", "mean", "10th percentile", "least", "optimal"], lines)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    folder = writable(Path(OUT.value or Path(__file__).parent / "results" / "packing_regret"))
    rows = measure(INSTANCES.value, FIRST_SEED.value)
    command = " ".join(["python -m experiments.packing_regret", *sys.argv[1:]])
    head = header(
        command, "none: nothing is measured on a device", instances=INSTANCES.value, first_seed=FIRST_SEED.value
    )
    save_rows(folder / "packing_regret.json", head, rows)
    text = (
        "# The chosen packing against the best one\n\n"
        f"{len(rows)} random instances of 2 to 4 programs, with branches in one at least, whose best packing wins "
        "something; the share of the proven optimum's gain that each method reaches. "
        f"{head['date']}.\n\n    {command}\n\n{summary(rows)}\n"
    )
    (folder / "packing_regret.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    app.run(main)
