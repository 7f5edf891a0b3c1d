"""Claim: the heavy ops of different architectures fall into clusters of near-equal shape (figure 7 of Jain et al. 2019,
arXiv 1901.10008).

    python -m experiments.shape_clusters
    python -m experiments.shape_clusters --function=serving.tenants:programs --out=clusters    of tenants of yours

Takes every dot and convolution of the normalised programs of all models, as matrix products, and clusters them for
several bounds on the padding of an op. Nothing runs on a device and parameters have shapes alone, so that the result
depends on the models and the compiler's passes only. The body of a scan counts once. `--function` takes
what `python -m coalesce inspect` does; each family of its tenants counts as a model, by the name of its first tenant.
"""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, cast

import jax
from absl import app, flags

import coalesce
from coalesce.clusters import canonical_gemm, Cluster, cluster, WASTE_BOUND
from coalesce.compile import check_names
from coalesce.family import find_families
from coalesce.heavy import heavy_eqns, heavy_op, HeavyOp
from coalesce.models import by_name, NAMES
from coalesce.passes.pipeline import normalise
from coalesce.target import programs_of, UsageError
from experiments.list_flags import define_names, define_numbers
from experiments.results import header, Row, save_rows, writable
from experiments.shape_plot import plot
from experiments.shape_report import report

# Models that differ in size alone are one architecture.
ARCHITECTURES = {
    "resnet18": "ResNet",
    "resnet34": "ResNet",
    "resnet50": "ResNet",
    "se_resnet50": "SENet",
    "senet154": "SENet",
    "mobilenetv2": "MobileNet",
    "vgg16": "VGG",
    "vit_ti16": "ViT",
    "vit_b16": "ViT",
    "bert_base": "BERT",
    "bert_small": "BERT",
    "lstm": "LSTM",
    "gru": "GRU",
    "dlrm": "DLRM",
    "mlp": "MLP",
}
Op = tuple[tuple[str, int], HeavyOp]  # ((model, position in its program), op)

FLAGS = flags.FLAGS
define_names("models", list(NAMES), "models of coalesce.models", NAMES)
flags.DEFINE_string("function", None, "MODULE:FUNCTION that returns programs, instead of models")
flags.DEFINE_integer("batch", 1, "rows of a request", lower_bound=1)
flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "dtype of weights and activations")
define_numbers(
    "bounds",
    [n / 20 for n in range(11)],
    "bounds on the padding of an op, a line of the table each",
    good=lambda bound: 0 <= bound < 1,
    wanted="from 0 to less than 1",
)
flags.DEFINE_float("waste_bound", WASTE_BOUND, "the bound whose clusters are listed and drawn")
flags.register_validator("waste_bound", lambda bound: 0 <= bound < 1, "a share from 0 to less than 1 is wanted")
flags.DEFINE_string("out", "experiments/results/shape_clusters", "folder of the results")


def heavy_ops(name: str) -> list[Op]:
    """Of one request to one model, after normalisation."""
    model = by_name(name, dtype=FLAGS.dtype, param_dtype=FLAGS.dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    program = normalise(coalesce.trace(model.apply, params, *model.inputs(FLAGS.batch), name=name)).program
    return [((name, i), heavy_op(eqn)) for i, eqn in enumerate(heavy_eqns(program.jaxpr))]


def heavy_ops_of_families(function: str) -> list[Op]:
    """Of the programs of a user's function, each family once."""
    programs = programs_of(function)
    check_names(programs)  # ops are counted by name
    families = find_families([normalise(program).program for program in programs])
    return [
        ((programs[family.lanes[0].tenant].name, i), heavy_op(eqn))
        for family in families
        for i, eqn in enumerate(heavy_eqns(family.jaxpr))
    ]


def models_of(found: Cluster) -> Counter[str]:
    """How many ops of each model there are."""
    return Counter(cast(tuple[str, int], name)[0] for name in found.members)


def architectures_of(found: Cluster) -> set[str]:
    return {ARCHITECTURES.get(model, model) for model in models_of(found)}


def flops(found: Cluster) -> int:
    """Of all members at the cluster's shape."""
    return 2 * found.gemm.batch * prod(found.shape)


def row_of(bound: float, clusters: Sequence[Cluster]) -> Row:
    """What a bound gives: clusters, padding and company."""
    several = [found for found in clusters if len(models_of(found)) > 1]
    across = [found for found in clusters if len(architectures_of(found)) > 1]
    padded = sum(map(flops, clusters))
    return {
        "bound": bound,
        "clusters": len(clusters),
        "ops": sum(len(found.members) for found in clusters),
        "padding": sum(found.waste * flops(found) for found in clusters) / padded,
        "largest_padding": max(1 - prod(shape) / prod(found.shape) for found in clusters for shape, _ in found.shapes),
        "clusters_of_several_models": len(several),
        "ops_with_another_model": sum(len(found.members) for found in several),
        "clusters_of_several_architectures": len(across),
        "ops_with_another_architecture": sum(len(found.members) for found in across),
        "flops_with_another_architecture": sum(map(flops, across)) / padded,
    }


def shape_rows(ops: Sequence[Op], clusters: Sequence[Cluster]) -> list[Row]:
    """A row for each model and shape, with the cluster it is in."""
    index = {name: found.index for found in clusters for name in found.members}
    counts: Counter[tuple[Any, ...]] = Counter()
    problems: Counter[tuple[Any, ...]] = Counter()
    for name, op in ops:
        gemm = canonical_gemm(op)
        key = (name[0], op.kind, *gemm.shape, index[name])
        counts[key] += 1
        problems[key] += gemm.batch
    fields = ("model", "kind", "m", "n", "k", "cluster")
    return [
        {**dict(zip(fields, key, strict=True)), "ops": counts[key], "problems": problems[key]} for key in sorted(counts)
    ]


def cluster_rows(clusters: Sequence[Cluster]) -> list[Row]:
    """The clusters of two or more architectures, the most FLOPs first."""
    across = sorted((found for found in clusters if len(architectures_of(found)) > 1), key=flops, reverse=True)
    return [
        {
            "shape": found.shape,
            "others": [shape for shape, _ in found.shapes if shape != found.shape],
            "padding": found.waste,
            "models": models_of(found),
        }
        for found in across
    ]


def given_flags() -> list[str]:
    names = ("function",) if FLAGS.function else ("models", "batch", "dtype")
    return [FLAGS[name].serialize() for name in (*names, "bounds", "waste_bound") if FLAGS[name].present]


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"what is {argv[1]}?")
    path = writable(Path(FLAGS.out)) / "shape_clusters.json"
    ops: list[Op] = []
    if FLAGS.function:
        try:
            ops = heavy_ops_of_families(FLAGS.function)
        except UsageError as e:
            raise app.UsageError(str(e)) from None
    for name in () if FLAGS.function else FLAGS.models:
        ops += heavy_ops(name)
        print(f"{name}: {sum(model == name for (model, _), _ in ops)} heavy ops", file=sys.stderr, flush=True)
    rows = [row_of(bound, cluster(ops, waste_bound=bound)) for bound in FLAGS.bounds]
    clusters = cluster(ops, waste_bound=FLAGS.waste_bound)
    command = shlex.join(["python", "-m", "experiments.shape_clusters", *given_flags()])
    models = list(dict.fromkeys(model for (model, _), _ in ops))
    settings = {"models": models, "batch": FLAGS.batch, "dtype": FLAGS.dtype}
    if FLAGS.function:
        settings = {"models": models, "function": FLAGS.function}
    head = header(command, "none", **settings)
    shapes = shape_rows(ops, clusters)
    save_rows(path, head, rows)
    save_rows(path.with_name("shape_clusters_ops.json"), {**head, "waste_bound": FLAGS.waste_bound}, shapes)
    text = report({**head, "waste_bound": FLAGS.waste_bound}, rows, cluster_rows(clusters))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    own = {model: ARCHITECTURES.get(model, model) for model in models}
    print(plot(path.with_suffix(".png"), rows, shapes, own, FLAGS.waste_bound))


if __name__ == "__main__":
    app.run(main)
