"""The experiments about segments and executables of several families run, from their command line to their files."""

import json
import time
from pathlib import Path

import pytest

from coalesce.runtime.bundle import Bundle
from experiments import banked, mixed_family, segments

pytestmark = pytest.mark.once  # of the runtime and its executables, which tests of their own run on both interpreters


def saved(folder: Path) -> list[dict]:
    (path,) = folder.glob("*.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())["rows"]


def test_segments_has_a_row_for_each_method_and_program(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(segments, "layers_for", lambda target_ms: 6 if target_ms > 10 else 2)
    monkeypatch.setattr(segments, "alone_ms", lambda layers: 5.0 * layers)
    arguments = ["--fields=width=8", "--rows=2", "--duration=0.5", "--repeats=1", "--widths=1", f"--out={tmp_path}"]
    segments.main([*arguments, "--methods=whole,three", "--tenants=2", "--short_slo_ms=2000", "--long_slo_ms=2000"])
    rows = {(row["method"], row["program"]): row for row in saved(tmp_path)}
    assert [own["segments"] for own in rows.values()] == [1, 1, 3, 3]
    assert all(0 <= own["attainment"] <= 1 for own in rows.values())
    assert sum(own["asked"] for own in rows.values()) == 2 * sum(
        own["asked"] for (method, _), own in rows.items() if method == "whole"
    )
    assert "| three  |" in capsys.readouterr().out


def test_mixed_family_counts_bundles_of_several_families(tmp_path, capsys, monkeypatch):
    """Which win where each bundle costs some milliseconds, whatever is in it, and however busy the machine is."""
    right = Bundle.wait
    monkeypatch.setattr(Bundle, "wait", lambda self: (time.sleep(0.008), right(self))[1])
    monkeypatch.setattr(Bundle, "is_at_hand", lambda self, within_s: False)
    kinds = "mlp.width=8;layers=2:4,mlp.width=8;layers=3:4"
    mixed_family.main([f"--kinds={kinds}", "--widths=1,2", "--duration=0.2", "--repeats=1", f"--out={tmp_path}"])
    apart, mixed = saved(tmp_path)
    assert apart["requests"] > 0 and not apart["mixed_bundles"] and not apart["mixed_executables"]
    assert 0 < mixed["mixed_bundles"] <= mixed["bundles"]
    assert all(" with " in own["entries"] and 8000 < own["us"] for own in mixed["mixed_executables"])
    assert "| apart  |" in capsys.readouterr().out


def test_banked_compares_a_full_bank_with_lanes_chosen_from_a_larger_one(tmp_path, capsys):
    fields = "--fields=width=8,layers=2"
    banked.main(["--model=mlp", fields, "--lanes=2", "--tenants=5", "--seconds=0.2", f"--out={tmp_path}"])
    full, chosen = saved(tmp_path)
    assert [full["slots"], chosen["slots"]] == [2, 5] and max(full["error"], chosen["error"]) < 1e-5
    assert "Choosing costs" in capsys.readouterr().out
