"""The comparison of attacks with torchattacks: tables by hand, and a run of both sides on a tiny model."""

import json

import pytest
import torch

from hf_dualmoe import DualMoEConfig, DualMoEForImageClassification, MoEConfig
from training.benchmarks.parity import parity

DIGITS = {"num_labels": 10, "image_size": 8, "num_channels": 1, "num_experts": 2, "width": [8, 8, 8, 16]}


def row(attack, ours, theirs, seconds=(1.0, 2.0)):
    sides = zip(parity.BACKENDS, (ours, theirs), seconds, strict=True)
    return {"attack": attack, "seeds": list(range(max(len(ours), len(theirs))))} | {
        backend: {"standing": standing, "costs": [{"cpu_seconds": s} for _ in standing]}
        for backend, standing, s in sides
    }


def test_table_by_hand():
    rows = [
        row("apgd-ce", ["1100", "1110"], ["1111", "1101"]),
        row("apgd-t", ["1110", "0111"], ["1111", "0011"]),
        row("square", ["0111", "1111"], ["1000", "0001"]),
    ]
    run = {"model": "tiny", "settings": {"version": "fast"}, "num_images": 10, "clean_correct": 4, "rows": rows}
    found = [parity.cells(run, r) for r in parity.all_rows(run)]
    assert found[0] == [
        *("tiny, 10, fast", "40.00", "apgd-ce", "25.00 (20.00 to 30.00)", "35.00 (30.00 to 40.00)", "-10.00", "0.50 x")
    ]
    # pointwise, ours: 0100 and 0110; theirs: 1000 and 0001
    assert found[3][2:] == ["pointwise", "15.00 (10.00 to 20.00)", "10.00", "+5.00 **too weak**", "-"]
    assert ["too weak" in cells[5] for cells in found] == [False, False, True, True]
    assert parity.render({"runs": [run]}).splitlines()[2].startswith("| tiny, 10, fast | 40.00 | apgd-ce | ")
    run["rows"] = rows[:2]
    assert len(parity.all_rows(run)) == 2  # not all attacks: no pointwise row
    once = [row("apgd-ce", ["11"], ["10"]), row("apgd-t", ["11"], ["11"]), row("square", ["10", "01"], ["11", "11"])]
    assert parity.pointwise(once)["hf_dualmoe"]["standing"] == ["10", "01"]  # a single seed counts for all
    assert parity.pointwise(once)["torchattacks"]["standing"] == ["10", "10"]


@pytest.fixture
def folder(tmp_path):
    """A saved dual model without training."""
    torch.manual_seed(0)
    names = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
    config = DualMoEConfig(standard=MoEConfig(**DIGITS), robust=MoEConfig(**DIGITS), alpha=0.6, **names)
    DualMoEForImageClassification(config).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_both_sides_are_measured(folder, tmp_path, monkeypatch, capsys):
    """torchattacks is not installed here: our own attacks stand in for its, so both sides must agree."""
    version = {"apgd-ce": {"steps": 2}, "square": {"queries": 3}}
    monkeypatch.setitem(parity.VERSIONS, "fast", version)
    make = parity.make_attack
    monkeypatch.setattr(parity, "make_attack", lambda *args, backend, **kwargs: make(*args, **kwargs))
    monkeypatch.setattr(parity.metadata, "version", lambda name: "1.0")
    output = tmp_path / "results.json"
    command = f"--model {folder} --num_images 30 --eps 12/255 --version fast --seeds 0 1 --output {output}".split()
    parity.main([*command, "--batch_size", "7", "--device", "cpu"])
    (run,) = json.loads(output.read_text())["runs"]
    assert run["settings"]["model"] == "tiny" and run["settings"]["eps"] == pytest.approx(12 / 255)
    assert [r["attack"] for r in run["rows"]] == ["apgd-ce", "square"]
    for found in run["rows"]:
        ours, theirs = found["hf_dualmoe"], found["torchattacks"]
        assert ours["standing"] == theirs["standing"] and len(ours["standing"]) == 2
        assert {len(standing) for standing in ours["standing"]} == {run["clean_correct"]}
    assert "tiny, 30, fast" in capsys.readouterr().out
