"""Claim: choosing 16 of 64 tenants in a bank at every call costs at most 5% over calls of a bank of 16, all of it read.

    python -m experiments.banked --model=resnet50 --dtype=bfloat16
    python -m experiments.banked --model=mlp --fields=width=64 --lanes=4 --tenants=16

The executables are those of the runtime, which read weights by slot (coalesce/serving). `full` has a bank with as many
slots as a call has lanes, and runs all of them, in an order that changes; `chosen` has a bank of --tenants, of which
each call runs others. Slots and inputs lie on the device already, so that nothing but the call is timed: until all
results are there, and (`sustained`) where ten calls are issued one after the other, both in turns in one run. What each
lane computes is compared with its tenant alone.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import coalesce
from coalesce.compile import default_costs, default_tuned
from coalesce.models import by_name, NAMES
from coalesce.passes.pipeline import normalise
from coalesce.serving.executable import compile_executable, Executable, Lanes
from coalesce.serving.fit import Fit, fit
from coalesce.serving.schema import Options, plan_schema
from coalesce.serving.staging import Filled, Lane
from coalesce.serving.store import Preparer, Store
from experiments import own_flags, pairs
from experiments.cells import largest_error, tenants_of
from experiments.list_flags import define_fields, fields_of
from experiments.methods import Candidate, Tenants
from experiments.peers_common import Burst
from experiments.results import device_name, header, Row, save_rows, table

DRAWS = 16  # calls with lanes of their own, which take turns
COLUMNS = ("slots", "bank_mib", "round_us_p10", "round_us_median", "round_us_p90", "sustained_us_median")

TOLERANCE = {"bfloat16": 1e-1, "float32": 1e-2}  # deep random networks amplify rounding, and TF32's

FLAGS = flags.FlagValues()
own_flags.define_common(FLAGS)
flags.DEFINE_enum("model", "resnet50", NAMES, "the model of all tenants", flag_values=FLAGS)
define_fields("fields", [], "fields of the model to set, as in width=64", flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", list(TOLERANCE), "of weights and activations", flag_values=FLAGS)
flags.DEFINE_integer("lanes", 16, "lanes of a call", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("tenants", 64, "tenants in the larger bank", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("repeats", 300, "timed calls of each bank", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("seconds", 20.0, "most time for the repeats", flag_values=FLAGS)


class Banked(NamedTuple):
    """Calls of one executable, each with lanes of its own."""

    executable: Executable
    bank: list[jax.Array]
    calls: list[Filled]  # on the device
    tenants: list[list[int]]  # of each call's lanes

    def run(self, call: int) -> list[jax.Array]:
        (outputs,) = self.executable.run([self.bank], [None], self.calls[call])
        return outputs


def main(argv: Sequence[str]) -> None:
    own_flags.parse("banked", FLAGS, argv)
    if FLAGS.tenants < FLAGS.lanes:
        raise SystemExit(f"--tenants={FLAGS.tenants} are fewer than --lanes={FLAGS.lanes}")
    fields = fields_of(FLAGS.fields)
    model = by_name(FLAGS.model, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype, **fields)
    conditions = {"model": FLAGS.model, "fields": fields, "dtype": FLAGS.dtype}
    conditions |= {"lanes": FLAGS.lanes, "tenants": FLAGS.tenants, "tolerance": TOLERANCE[FLAGS.dtype]}
    head = header(own_flags.command("banked", FLAGS), FLAGS.device_name or device_name(), FLAGS.note, **conditions)
    path = own_flags.folder(FLAGS) / f"banked_{FLAGS.model}_{FLAGS.dtype}.json"
    rows = measured(tenants_of(model, FLAGS.tenants, 1))
    save_rows(path, head, rows)
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def measured(tenants: Tenants) -> list[Row]:
    print("tenants alone", file=sys.stderr, flush=True)
    alone = jax.jit(tenants.apply)
    want: list[np.ndarray] = []
    for params, inputs in zip(tenants.params, tenants.inputs, strict=True):
        (output,) = jax.tree.leaves(alone(params, *inputs))  # models with one result
        want.append(np.asarray(output, np.float64))
    banks = both(tenants)
    errors = {name: error(banked, want) for name, banked in banks.items()}
    for name, found in errors.items():
        if not found <= TOLERANCE[FLAGS.dtype]:  # a NaN is wrong too
            raise SystemExit(f"{name}: outputs differ from the tenants' own by {found:.1e}")
    limits = {"repeats": FLAGS.repeats, "seconds": FLAGS.seconds / 2}
    bursts = {name: Burst(Candidate("", in_turn(banked)), 1) for name, banked in banks.items()}
    rounds = pairs.timed(bursts, **limits)
    sustained = pairs.timed({name: pairs.in_a_row(burst) for name, burst in bursts.items()}, **limits)
    return [
        {
            "method": name,
            "slots": bank.executable.lanes[0].capacity,
            "bank_mib": round(sum(x.nbytes for x in bank.bank) / 2**20),
            "round_us_median": rounds[name].median,
            "round_us_p10": rounds[name].p10,
            "round_us_p90": rounds[name].p90,
            "sustained_us_median": sustained[name].median,
            "repeats": rounds[name].repeats,
            "error": errors[name],
        }
        for name, bank in banks.items()
    ]


def both(tenants: Tenants) -> dict[str, Banked]:
    """`full` and `chosen`, of one schema."""
    fits = [fit_of(tenants, i) for i in range(tenants.count)]
    measured = default_tuned(None, None)
    options = Options(jax.default_backend(), default_costs(None, measured), tuned=measured)
    schema = plan_schema(fits[0], options)
    prepare, rng = Preparer(schema), np.random.default_rng(0)
    found: dict[str, Banked] = {}
    for name, capacity in (("full", FLAGS.lanes), ("chosen", tenants.count)):
        print(f"{name}: a bank of {capacity}", file=sys.stderr, flush=True)
        store = Store(schema, capacity, prepare(fits[0]))
        for slot in range(capacity):
            assert store.take() == slot, "a new bank gives its slots in order"
            store.write(slot, prepare(fits[slot]))
        executable = compile_executable([Lanes(schema, schema.segments[0], FLAGS.lanes, capacity)])
        chosen = [rng.permutation(capacity)[: FLAGS.lanes].tolist() for _ in range(DRAWS)]
        calls = [on_device(executable, [Lane(i, flat(tenants, i)) for i in own]) for own in chosen]
        found[name] = Banked(executable, store.bank, calls, chosen)
    return found


def fit_of(tenants: Tenants, i: int) -> Fit:
    program = coalesce.trace(tenants.apply, tenants.params[i], *tenants.inputs[i], name=f"tenant {i}")
    return fit([normalise(program).program])


def flat(tenants: Tenants, i: int) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tenants.inputs[i])]


def on_device(executable: Executable, lanes: Sequence[Lane]) -> Filled:
    """What a call brings, copied to where it is read."""
    staged = executable.stage([lanes])
    copied = jax.block_until_ready(jax.tree.map(jnp.array, staged.arguments))
    executable.take_back(staged)
    return Filled(copied, [], [])


def error(banked: Banked, want: Sequence[np.ndarray]) -> float:
    """Of all lanes of all calls, the largest."""
    errors: list[float] = []
    for call, tenants in enumerate(banked.tenants):
        (outputs,) = banked.run(call)
        errors.append(largest_error(list(np.asarray(outputs, np.float64)), [want[i] for i in tenants]))
    return max(errors)


def in_turn(banked: Banked) -> Callable[[], Any]:
    calls = itertools.cycle(range(DRAWS))
    return lambda: banked.run(next(calls))


def report(head: Mapping[str, Any], rows: Sequence[Row]) -> str:
    conditions = head["settings"]
    full, chosen = rows
    costs = {key: chosen[key] / full[key] - 1 for key in ("round_us_median", "sustained_us_median")}
    lines = [[row["method"], *(f"{row[key]:,.0f}" for key in COLUMNS), f"{row['error']:.0e}"] for row in rows]
    lanes, tenants, model, dtype = (conditions[key] for key in ("lanes", "tenants", "model", "dtype"))
    text = [
        f"# {lanes} of {tenants} banked tenants: {model}, {dtype}",
        f"{head['device']}, JAX {head['versions']['jax']}, {head['date']}. {head['note']}".rstrip(),
        f"    {head['command']}",
        "Microseconds of a call, and of one of ten that are issued one after the other (sustained).",
        table(["bank", "slots", "MiB", "p10", "median", "p90", "sustained", "error"], lines),
        f"Choosing costs {costs['round_us_median']:+.1%} of a call, {costs['sustained_us_median']:+.1%} sustained; "
        "the goal is at most 5%.",
    ]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
