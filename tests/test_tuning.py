"""The database of measurements, what it answers, and what is worth measuring."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from coalesce.blocks import Blocks
from coalesce.costs import Costs, device_of
from coalesce.errors import TuningError
from coalesce.heavy import heavy_op
from coalesce.kernels import FUSING, KERNELS, VERSION
from coalesce.tuning import Database, Entry, Key, key_of, known, load, packaged, save, Tuned, tuned_on, user_file
from coalesce.tuning.candidates import candidates, SHARED_BYTES
from coalesce.tuning.entry import blocks_of
from coalesce.tuning.show import table

GPU = "NVIDIA H200"
SMALL, LARGE = Blocks(16, 32, 16), Blocks(128, 128, 64, 8, 4)


def op_of(call, *shapes, dtype=jnp.float32):
    (eqn,) = jax.make_jaxpr(call)(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).jaxpr.eqns
    return heavy_op(eqn)


CONV = partial(
    lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
)
DOT = op_of(lax.dot, (49, 512), (512, 2048), dtype=jnp.bfloat16)
IMAGE = op_of(CONV, (1, 56, 56, 64), (3, 3, 64, 64))
ENTRY = Entry(
    "indexed_gemm",
    9.5,
    LARGE,
    {f"indexed_gemm {SMALL}": 11.0, f"indexed_gemm {LARGE}": 9.5, "batched_dot": 20.0, "separate": None},
    "mul add",
    "0.11.2",
)


def database(*widths, op=DOT, entry=ENTRY, rows=1):
    return Database({key_of(op, width, rows, GPU): entry for width in widths})


def test_what_is_saved_is_loaded(tmp_path):
    beside = Entry("separate", 3.0, company={"separate": 4.0, "batched_dot": None})
    both = database(16).over(database(4, op=IMAGE, entry=beside))
    save(both, tmp_path / "new" / "tuned.json")
    assert load(tmp_path / "new" / "tuned.json") == both
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tuned.json"]


def test_an_entry_a_line(golden):
    golden(str(database(16, 2).over(database(1, op=IMAGE, entry=Entry("separate", 3.0)))).rstrip())


def test_the_order_of_measuring_does_not_matter():
    assert str(database(16, 2)) == str(database(2, 16))


def test_the_users_entries_go_before_the_others():
    own, others = database(16, entry=replace(ENTRY, us=1.0)), database(16, 32)
    merged = own.over(others)
    assert [merged.entries[key_of(DOT, width, 1, GPU)].us for width in (16, 32)] == [1.0, 9.5]


BROKEN = {
    "no file": (None, "cannot be read: No such file or directory"),
    "no JSON": ("{", "is no tuning database .*remove it"),
    "a list": ("[]", "has format None, .* reads format 1; tune into another file"),
    "another format": ('{"format": 2, "entries": []}', "has format 2, and this version of Coalesce reads format 1"),
    "no entries": ('{"format": 1}', "an entry that is none .KeyError"),
    "half an entry": ('{"format": 1, "entries": [{"device": "x"}]}', "KeyError: 'version'.; remove its line"),
    "no blocks": (str(database(16)).replace(str(LARGE), "large"), "are no blocks; expected such as 64x64x32 w4 s3"),
}


@pytest.mark.parametrize(("text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_none(text, message, tmp_path):
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TuningError, match=message):
        load(path)
    with pytest.raises(TuningError, match=str(path)):
        tuned_on(GPU, str(path))


def test_a_folder_is_no_file_that_tuning_makes(tmp_path):
    with pytest.raises(TuningError, match="cannot be read: Is a directory; name another file"):
        load(tmp_path)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TuningError, match="cannot be written: .*; give another file with --out"):
        save(database(16), tmp_path / "file" / "tuned.json")


def test_the_nearest_width_within_a_factor_of_four_and_any_above_what_fills_a_device():
    other = replace(ENTRY, kernel="batched_dot", us=1.0, blocks=None)
    tuned = Tuned(database(16).over(database(2, entry=other)), GPU)
    nearest = {width: tuned.nearest(DOT, width, 1) for width in (1, 2, 5, 6, 16, 64, 65, 1024)}
    found = {width: entry and entry.kernel for width, entry in nearest.items()}
    assert found == {
        1: "batched_dot",
        2: "batched_dot",
        5: "batched_dot",
        6: "indexed_gemm",
        16: "indexed_gemm",
        64: "indexed_gemm",
        65: "indexed_gemm",
        1024: "indexed_gemm",
    }
    few = {width: Tuned(database(2, 7), GPU).nearest(DOT, width, 1) for width in (28, 29)}
    assert few[28] is not None and few[29] is None
    assert Tuned(database(16), GPU).nearest(DOT, 3, 1) is None
    assert tuned.us(DOT, 16, 1, "indexed_gemm") == 9.5
    assert tuned.us(DOT, 15, 1, "indexed_gemm") is None


def test_two_kernels_are_compared_where_both_were_measured():
    """At the nearest such width, each problem with its part of the time; an H100 by what an H200 says of the two."""
    both = replace(ENTRY, tried={"indexed_gemm 64x64x32 w4 s3": 9.5, "batched_dot": 20.0})
    only = replace(ENTRY, us=7.0, blocks=Blocks(128, 64, 32), tried={})
    known = database(8, entry=both).over(database(32, entry=only))
    tuned, pair = Tuned(known, GPU), ("indexed_gemm", "batched_dot")
    assert tuned.rivals(DOT, 8, 1, pair) == (9.5, 20.0)
    assert tuned.rivals(DOT, 32, 1, pair) == (4 * 9.5, 4 * 20.0)
    assert tuned.rivals(DOT, 32, 1, ("batched_dot", "indexed_gemm")) == (4 * 20.0, 4 * 9.5)
    assert tuned.rivals(DOT, 1, 1, pair) is None  # too far below
    assert tuned.rivals(DOT, 8, 1, ("indexed_gemm", "separate")) is None
    assert tuned.blocks(DOT, 32, 1, "indexed_gemm") == Blocks(128, 64, 32)
    h200 = Database({replace(key, device="NVIDIA H200"): entry for key, entry in known.entries.items()})
    assert Tuned(h200, "NVIDIA H100 80GB HBM3").rivals(DOT, 8, 1, pair) == (9.5, 20.0)


def test_one_problem_alone_says_least_of_several():
    """XLA runs it by other kernels: some of what won for one ResNet-50 runs several one after another."""
    alone = replace(ENTRY, kernel="separate", us=1.0, blocks=None)
    tuned = Tuned(database(8).over(database(1, entry=alone)), GPU)
    found = {width: tuned.kernel(DOT, width, 1) for width in (1, 2, 3, 8)}
    assert found == {1: "separate", 2: "indexed_gemm", 3: "indexed_gemm", 8: "indexed_gemm"}
    assert Tuned(database(1, entry=alone), GPU).nearest(DOT, 2, 1) is None
    assert Tuned(database(1, entry=ENTRY), GPU).nearest(DOT, 2, 1) == ENTRY
    wide = replace(ENTRY, us=3.0)
    both = Tuned(database(1, entry=ENTRY).over(database(16, entry=wide)), GPU)
    assert [both.nearest(DOT, width, 1) for width in (1, 4, 5)] == [ENTRY, wide, wide]


def test_blocks_of_a_kernel_are_of_the_nearest_width_at_which_it_was_measured():
    other = replace(ENTRY, kernel="mosaic_gemm", us=7.0, tried={})
    tuned = Tuned(database(8).over(database(32, entry=other)), GPU)
    assert tuned.kernel(DOT, 32, 1) == "mosaic_gemm"
    assert tuned.blocks(DOT, 32, 1, "indexed_gemm") == ENTRY.blocks


def test_what_fills_a_device_is_asked_last():
    """After what a kin measured of about so many; and not where launches or memory grow with every problem."""
    h100, h200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
    wide = replace(ENTRY, kernel="batched_dot", blocks=None)
    own = {replace(key, device=h100): ENTRY for key in database(8).entries}
    kin = {replace(key, device=h200): wide for key in database(64).entries}
    tuned = Tuned(Database({**own, **kin}), h100)
    found = {width: tuned.kernel(DOT, width, 1) for width in (8, 32, 33, 256, 257)}
    assert found == {8: "indexed_gemm", 32: "indexed_gemm", 33: "batched_dot", 256: "batched_dot", 257: "indexed_gemm"}
    for kernel in ("separate", "conv_slices"):
        growing = Tuned(database(8, entry=replace(ENTRY, kernel=kernel, blocks=None)), GPU)
        assert growing.nearest(DOT, 32, 1) is not None and growing.nearest(DOT, 33, 1) is None


def test_an_h100_takes_the_kernels_of_an_h200_and_not_its_times():
    h100, h200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
    tuned = Tuned(Database({replace(key, device=h200): entry for key, entry in database(16).entries.items()}), h100)
    assert tuned.kernel(DOT, 16, 1) == "indexed_gemm"
    assert tuned.us(DOT, 16, 1, "indexed_gemm") is None
    own = replace(ENTRY, kernel="batched_dot", blocks=None)
    both = Database(
        {
            replace(key, device=device): entry
            for device, entry in ((h200, ENTRY), (h100, own))
            for key in database(16).entries
        }
    )
    assert Tuned(both, h100).kernel(DOT, 16, 1) == "batched_dot"
    assert Tuned(both, h200).kernel(DOT, 16, 1) == "indexed_gemm"


def test_only_the_same_op_lanes_device_and_version():
    tuned = Tuned(database(16), GPU)
    assert tuned.kernel(DOT, 16, 1) == "indexed_gemm"
    assert tuned.nearest(IMAGE, 16, 1) is None
    assert tuned.nearest(op_of(lax.dot, (49, 512), (512, 2048)), 16, 1) is None
    assert tuned.nearest(op_of(partial(lax.dot, precision="highest"), (49, 512), (512, 2048)), 16, 1) is None
    assert tuned.nearest(DOT, 16, 2) is None
    assert Tuned(database(16), "NVIDIA A100").kernel(DOT, 16, 1) is None
    older = Database({replace(key_of(DOT, 16, 1, GPU), version=VERSION - 1): ENTRY})
    assert Tuned(older, GPU).nearest(DOT, 16, 1) is None


def test_blocks_are_the_best_of_the_kernel_that_is_asked_about():
    tuned = Tuned(database(16), GPU)
    assert tuned.blocks(DOT, 16, 1, "indexed_gemm") == LARGE
    assert tuned.blocks(DOT, 16, 1, "batched_dot") is None
    second = replace(ENTRY, kernel="batched_dot", us=1.0, blocks=None)
    assert Tuned(database(16, entry=second), GPU).blocks(DOT, 16, 1, "indexed_gemm") == LARGE


@pytest.mark.parametrize("kernel", ["gone", "conv_slices"])
def test_a_kernel_that_cannot_run_the_op_is_not_chosen(kernel):
    assert Tuned(database(16, entry=Entry(kernel, 1.0)), GPU).kernel(DOT, 16, 1) is None


def test_what_is_used(tmp_path, monkeypatch):
    """The packaged entries under the user's own, unless something else is given."""
    key = next(iter(packaged().entries))
    own = Database({key: Entry("separate", 1.0)})
    monkeypatch.setenv("COALESCE_TUNED", str(tmp_path / "tuned.json"))
    expected = {False: None, None: packaged().entries[key]}
    for given, entry in expected.items():
        assert tuned_on(key.device, given).own.get((key.op, key.rows), {}).get(key.width) == entry
    save(own, tmp_path / "tuned.json")
    for given in (None, own, tmp_path / "tuned.json", str(tmp_path / "tuned.json")):
        assert tuned_on(key.device, given).own[key.op, key.rows][key.width].kernel == "separate"


def test_measured_times_go_before_predicted_ones():
    device = device_of("gpu", GPU)
    costs, untuned = Costs(device, tuned=Tuned(database(16), GPU)), Costs(device)
    assert costs.op(DOT, 16) == costs.launch + 9.5
    assert costs.op(DOT, 16, kernel="batched_dot") == costs.launch + 20.0
    assert costs.op(DOT, 8) == untuned.op(DOT, 8, kernel="indexed_gemm")
    assert costs.op(DOT, 1) == untuned.op(DOT, 1)
    assert Costs(device, {(DOT.key, "indexed_gemm", 16, 1): 2.0}, costs.tuned).op(DOT, 16) == 2.0


OPS = {
    "dot": DOT,
    "conv": IMAGE,
    "row": op_of(lax.dot, (1, 512), (512, 10)),
    "grouped": op_of(partial(CONV, feature_group_count=8), (1, 4, 4, 8), (3, 3, 1, 8)),
    "integers": op_of(lax.dot, (2, 3), (3, 4), dtype=jnp.int32),
}


@pytest.mark.parametrize("name", OPS)
def test_candidates_can_run_and_are_not_many(name):
    op = OPS[name]
    found = candidates(op, 16, 1, "gpu")
    assert len(set(found)) == len(found) < 130
    assert all(KERNELS[kernel].supports(op) for kernel, _ in found)
    for kernel, blocks in found:
        assert (blocks is not None) == (kernel in FUSING)
        if blocks and kernel == "indexed_gemm":
            used = (blocks.m + blocks.n) * blocks.k * op.lhs.dtype.itemsize * blocks.stages
            assert used <= SHARED_BYTES
            assert blocks.m < 2 * max(16, op.m) and blocks.n < 2 * max(16, op.n)
    kernels = {kernel for kernel, _ in found}
    assert ("indexed_gemm" in kernels) == (name in ("dot", "conv", "row"))
    assert ("batched_matvec" in kernels) == (name == "row")


def test_candidates_elsewhere():
    assert candidates(DOT, 16, 1, "cpu") == [("batched_dot", None), ("separate", None)]
    assert candidates(IMAGE, 100, 1, "cpu") == [(name, None) for name in ("conv_slices", "conv_grouped", "separate")]
    assert candidates(op_of(lax.dot, (2, 3), (3, 4), dtype=jnp.int32), 100, 1, "gpu") == [("batched_dot", None)]


def test_table(golden):
    older = Database({Key(GPU, VERSION - 1, key_of(IMAGE, 4, 2, GPU).op, 4, 2): Entry("separate", 3.0)})
    company = {f"indexed_gemm {LARGE}": 16.0, f"indexed_gemm {SMALL}": 12.0, "separate": None}
    golden(table(database(16).over(database(2, entry=replace(ENTRY, company=company))).over(older)))


def test_without_a_home_there_is_what_comes_along(monkeypatch):
    monkeypatch.delenv("COALESCE_TUNED", raising=False)

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", nobody)
    assert user_file() is None
    assert known() is packaged()


@pytest.mark.parametrize("text", [
    "0x16x16 w4 s3", "48x16x16 w4 s3", "16x16x16 w0 s3", "16x16 w4 s3", "100x64x64 w4 s3 turned",
    "16x192x48 w4 s3", "192x192x64 w4 s3", "64x192x192 w4 s3", "16x16x16 w4 s3 upright",
    "96x64x64 w4 s3", "8x64x64 w4 s3 over turned",
])  # fmt: skip
def test_blocks_that_are_none(text):
    with pytest.raises(ValueError, match="are no blocks"):
        blocks_of(text)


@pytest.mark.parametrize("blocks", [
    Blocks(64, 192, 32, 8, 3), Blocks(128, 96, 32, 8, 3, over=True),
    Blocks(200, 192, 64, 12, 3, turned=True), Blocks(200, 192, 32, 12, 4, turned=True, over=True),
], ids=str)  # fmt: skip
def test_blocks_as_text(blocks):
    assert blocks_of(str(blocks)) == blocks
