"""How many requests are in time, by policy: against rate, burstiness, SLO, number of tenants and of programs.

    python -m experiments.slo_attainment                                   # simulated: exact, on any machine
    python -m experiments.slo_attainment --real                            # on the device at hand, a subset

Simulated, all policies run the same arrivals on a virtual clock (experiments/simulated.py), in sweeps of one parameter
after the other (experiments/slo_sweeps.py); a search finds for each the rate at which 99% of the requests meet the SLO.
For real, the runtime serves tenants of one model or several under its own policy and, with coalescing off, under FIFO
and EDF (experiments/slo_serve.py); on a GPU beside it PyTorch does, with a CUDA graph a tenant behind an EDF queue
(experiments/slo_torch.py). Rows that the results have already are not made again.

On a GPU, where minutes are dear, in this order; each goes on where it had to stop:

    export JAX_COMPILATION_CACHE_DIR=.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
    GPU="--real --dtype=bfloat16 --lanes=1,2,4,8,16 --loads= --probe_s=3 --within=0.08 --budget_s=240"
    python -m experiments.slo_attainment $GPU --models=resnet50 --policies=coalescing,edf,fifo
    python -m experiments.slo_attainment $GPU --models=resnet50 --policies=torch_edf
    MIX="--models=resnet18,resnet50,mobilenetv2,bert_small --lanes=1,2,4 --cvs=1 --segments=1 --nomixed"
    python -m experiments.slo_attainment $GPU $MIX --policies=coalescing,edf,fifo
    python -m experiments.slo_attainment $GPU $MIX --policies=torch_edf

At given rates policies take turns, coalescing also with the policy in a process of its own (`elsewhere`):

    RATES="--real --models=resnet50 --dtype=bfloat16 --lanes=1,4,16 --segments=1 --nomixed --probe_s=2 --cvs=1"
    python -m experiments.slo_attainment $RATES --rates=6000,7500,9000,15000 --policies=coalescing,elsewhere
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from experiments import slo_report, slo_serve, slo_sweeps
from experiments.results import header, writable
from experiments.settings import command, FLAGS
from experiments.simulated import chosen, DEVICE, fill, POLICIES

flags.DEFINE_bool("real", False, "serve on the device at hand, instead of simulating")
slo_serve.define_flags()
SHARED = (
    *("policies", "requests", "seed", "dtype", "precision", "tolerance", "budget_s"),
    *("device_name", "note", "out", "force"),
)
for shared in SHARED:
    flags.declare_key_flag(shared)  # --help lists them


def simulate_all() -> None:
    folder = writable(Path(FLAGS.out or Path("experiments", "results", "slo_attainment")))
    head = header(command("slo_attainment", "policies"), DEVICE, FLAGS.note, requests=FLAGS.requests, seed=FLAGS.seed)
    rows = fill(
        folder / "slo_attainment.json",
        head,
        slo_sweeps.cells(chosen(FLAGS.policies)),
        slo_sweeps.cells(list(POLICIES)),
        slo_sweeps.cell_of,
        lambda cell: slo_sweeps.measure(cell, FLAGS.requests, FLAGS.seed),
        FLAGS.force,
    )
    text = slo_report.report(head, rows)
    (folder / "slo_attainment.md").write_text(text, encoding="utf-8")
    print(text)
    print(slo_report.plot(folder / "slo_attainment.png", rows))


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]}?")
    slo_serve.serve_all() if FLAGS.real else simulate_all()


if __name__ == "__main__":
    app.run(main)
