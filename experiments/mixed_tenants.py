"""Claim: tenants of different architectures are served faster in one program that packs across them or runs them side
by side, as the cost model says, and never slower.

    python -m experiments.mixed_tenants
    python -m experiments.mixed_tenants --sets=recurrent,berts --lanes=4 --dtype=bfloat16
    python -m experiments.mixed_tenants --sets=resnets --notry_options      one configuration: half of the compile time
    python -m experiments.mixed_tenants --sets=everything --notry_options --nocalled      graphs of our own alone

Times a round of all tenants of a set of models, and ten in a row: one ahead-of-time executable a tenant (`sequential`),
one fused program a model (`per_family`), and all in one fused program. `auto` packs across families, and runs them side
by side, where the cost model predicts a gain; `always` packs wherever it is legal. `never` does neither, `beside` is
`never` with families side by side, and `turns` is `auto` without. `launches` is `auto` with kernel launches that ops of
different shapes share as they are. Launches and side by side there are on a GPU alone, where each of these but the
first is also tried as CUDA graphs that are launched without JAX. A cell is one set; see tenant_scaling for how a cell
is measured and how a second run goes on. Models are smaller on a CPU (--sizes); the header says what was set.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from absl import app, flags

from coalesce.clusters import WASTE_BOUND
from coalesce.models import by_name, NAMES
from experiments import methods, mixed_methods, settings
from experiments.cells import measure_cell, tenants_of
from experiments.list_flags import define_fields_of_models
from experiments.methods import Candidate, Method, Options, Tenants
from experiments.mixed_methods import Mix
from experiments.mixed_report import plot, report
from experiments.results import device_name, header, Row

SETS = {  # models, some with a field of their own
    "mlps": tuple(f"mlp.width={width}" for width in (64, 60, 56, 52, 48, 44, 40, 36)),
    "resnets": ("resnet18", "resnet50"),
    "vision": ("resnet50", "vgg16", "mobilenetv2"),
    "berts": ("bert_small", "bert_base"),
    "recurrent": ("lstm", "gru"),
    "everything": NAMES,
}
METHODS = ("sequential", "per_family", "never", "beside", "turns", "auto", "launches", "always")
IN_A_ROW = 10

IMAGES = ("resnet18", "resnet34", "resnet50", "se_resnet50", "senet154", "mobilenetv2", "vgg16", "vit_ti16", "vit_b16")
# Tables of DLRM are capped in both: they are looked up, and no heavy op reads them.
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "full": {"dlrm": {"max_rows": 100_000}},
    "small": {
        **{name: {"image_size": 96} for name in IMAGES},
        **{name: {"length": 32} for name in ("bert_small", "bert_base")},
        "dlrm": {"max_rows": 1_000},
    },
}

FLAGS = flags.FLAGS  # experiments/settings.py has more of them
flags.adopt_module_key_flags(settings)
flags.DEFINE_list("sets", list(SETS), f"sets of models, one cell each; of {', '.join(SETS)}")
flags.DEFINE_integer("lanes", 1, "tenants of each model", lower_bound=1)
flags.DEFINE_enum("sizes", None, list(SIZES), "sizes of models and requests; small on a CPU unless said otherwise")
define_fields_of_models("fields", "fields of single models to set, as in lstm.steps=5,vgg16.image_size=32")
flags.DEFINE_float("waste_bound", WASTE_BOUND, "the largest share of an op in a superkernel that may be padding")
flags.DEFINE_bool("called", True, "on a GPU also try fused programs as JAX calls them, not as graphs of our own alone")
flags.register_validator("waste_bound", lambda bound: 0 <= bound < 1, "a share from 0 to less than 1 is wanted")


def check_sets(known: Collection[str]) -> None:
    if not FLAGS.sets:
        raise app.UsageError(f"--sets= names none. Sets: {', '.join(known)}")
    if unknown := [name for name in FLAGS.sets if name not in known]:
        raise app.UsageError(f"what is {unknown[0]}? Sets: {', '.join(known)}")


def fields_of_models() -> dict[str, dict[str, Any]]:
    """What is set of each model."""
    sizes = FLAGS.sizes or ("small" if jax.default_backend() == "cpu" else "full")
    found = {name: dict(fields) for name, fields in SIZES[sizes].items()}
    for item in FLAGS.fields:
        model, own = settings.named(item)
        found.setdefault(model, {}).update(own)
    return found


def mix_of(items: Sequence[str], fields: dict[str, dict[str, Any]]) -> Mix:
    dtypes = {"dtype": FLAGS.dtype, "param_dtype": FLAGS.dtype}
    models = [by_name(name, **dtypes, **fields.get(name, {}) | own) for name, own in map(settings.named, items)]
    return [tenants_of(model, FLAGS.lanes, FLAGS.batch) for model in models]


def chosen_methods() -> dict[str, Method[Mix]]:
    sequential = partial(methods.sequential, own_executables=settings.own_executables())
    # within one program few kernels are independent: tried, since what others are compared with is to be at its best
    on_gpu = jax.default_backend() == "gpu"
    called = FLAGS.called or not on_gpu
    per_family = partial(methods.fused, side_by_side=on_gpu, captured=on_gpu) if called else only_captured
    configured: dict[str, Method[Mix]] = {
        "sequential": partial(mixed_methods.one_by_one, method=sequential),
        "per_family": partial(mixed_methods.one_by_one, method=per_family),
    }
    fused = partial(mixed_methods.fused, waste_bound=FLAGS.waste_bound, called=called, captured=on_gpu)
    configured["never"] = partial(fused, policy="never", side_by_side=False)
    configured["beside"] = partial(fused, policy="never", side_by_side=True)
    configured["turns"] = partial(fused, policy="auto", side_by_side=False)
    configured["auto"] = partial(fused, policy="auto")
    configured["launches"] = partial(fused, policy="auto", launches=True)
    configured["always"] = partial(fused, policy="always")
    return {name: configured[name] for name in settings.wanted(METHODS)}


def only_captured(tenants: Tenants, options: Options) -> Iterator[Candidate]:
    return methods.captured(tenants)


def main(argv: Sequence[str]) -> None:
    settings.begin(argv, METHODS)
    check_sets(SETS)
    fields = fields_of_models()
    common = {"dtype": FLAGS.dtype, "batch": FLAGS.batch, "lanes": FLAGS.lanes}
    conditions = {
        **common,
        "fields": fields,
        "waste_bound": FLAGS.waste_bound,
        "precision": FLAGS.precision,
        "tolerance": settings.tolerance(),
    }
    head = header(settings.command("mixed_tenants"), FLAGS.device_name or device_name(), FLAGS.note, **conditions)
    special = [FLAGS.dtype] if FLAGS.dtype != "float32" else []
    special += [f"{name}{common[name]}" for name in ("batch", "lanes") if common[name] > 1]
    path = settings.folder() / f"{'_'.join(['mixed_tenants', *special])}.json"

    def measure(name: str) -> list[Row]:
        print(f"{name}: {FLAGS.lanes} each of {', '.join(SETS[name])}", file=sys.stderr, flush=True)
        mix, limits = mix_of(SETS[name], fields), settings.limits() | {"in_a_row": IN_A_ROW}
        measured = measure_cell(mix, chosen_methods(), settings.options_to_try(), **limits)
        return [{"set": name, "models": SETS[name], **common, "method": m, **row} for m, row in measured.items()]

    rows = settings.measure_cells(
        path,
        head,
        FLAGS.sets,
        cell_of=lambda row: row["set"],
        methods=lambda _: chosen_methods(),
        measure=measure,
        order=lambda row: list(SETS).index(row["set"]),
    )
    if not rows:
        return
    text = report(head, rows)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    print(plot(path.with_suffix(".png"), rows))


if __name__ == "__main__":
    app.run(main)
