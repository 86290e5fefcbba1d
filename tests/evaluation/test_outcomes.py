"""The raw record: every accuracy of results.json that comes from whole test images is counted again from it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.evaluation.batches import correct_mask
from hf_dualmoe.evaluation.evaluation import PARTS, RobustnessReport, evaluate_robustness
from hf_dualmoe.evaluation.outcomes import Outcomes, outcomes_path, recount
from hf_dualmoe.evaluation.store import Outcome

SETTINGS = {"eps": 0.02, "steps": 2, "progress": False, "alphas": (0.0, 0.6, 0.75, 1)}
# the sanity checks look at a sample
FULL = {"level": [part for part in PARTS if part != "sanity"], "autoattack_version": "fast", "attack_dtype": "bf16"}
NO_ACCURACIES = {"intervals", "expert_load", "route_flip_rate", "autoattack_sources"}


@pytest.fixture(scope="module")
def model(toy_dual):
    return toy_dual


@pytest.fixture(scope="module")
def dataset(toy_data):
    return toy_data


def places(report):
    """Every accuracy of a results.json that was measured on whole test images: its place there -> %."""
    metrics = report["metrics"]
    found = {name: value for name, value in metrics.items() if name == "sa" or name.startswith("ra_")}
    for name, values in metrics.get("components", {}).items():
        found |= {f"components/{name}/{key}": value for key, value in values.items()}
    found |= {f"autoattack/{name}": value for name, value in metrics.get("autoattack", {}).items()}
    for point in metrics.get("eps_curve", []):
        found |= {f"eps_curve/{point['eps']}/{key}": value for key, value in point.items() if key != "eps"}
    for name, value in metrics.get("worst_case", {}).get("members", {}).items():
        found[f"ra_{name}" if f"ra_{name}" in metrics else f"worst_case/{name}"] = value
    for point in report["alpha_sweep"]:
        found |= {f"alpha_sweep/{point['alpha']}/{key}": value for key, value in point.items() if key != "alpha"}
    groups = {"components", "autoattack", "eps_curve", "worst_case"}
    unknown = {name for name in metrics if name not in {*found, *groups, *NO_ACCURACIES}}
    assert not unknown, f"are these accuracies? {unknown}"
    assert metrics.get("worst_case", {}).get("accuracy") == metrics.get("ra_worst_case")
    return found


def evaluated(model, dataset, folder, **settings):
    """The results.json of an evaluation, and the record beside it."""
    evaluate_robustness(model, dataset, **{**SETTINGS, **settings}, path=folder / "results.json")
    report = json.loads((folder / "results.json").read_text())
    assert report["outcomes"] == "outcomes.parquet" and not list(folder.glob("*.partial"))
    return report, pq.read_table(folder / "outcomes.parquet")


@pytest.fixture(scope="module")
def full(model, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    report, table = evaluated(model, dataset, folder, **FULL, resume_dir=folder / "parts")
    return report, table, folder


def test_every_accuracy_is_counted_again(full, dataset):
    report, table, folder = full
    assert report["failures"] == {}
    assert recount(table) == pytest.approx(places(report), abs=1e-9)
    assert {"alpha_sweep/0.75/ra_pgd2", "components/robust/sa", "worst_case/whole ce", "ra_router_pgd2"} <= set(
        table.column_names
    )
    assert 0 < recount(table)["ra_worst_case"] < recount(table)["sa"] < 100
    assert table["index"].to_pylist() == list(range(100, 123))
    assert table["label"].to_pylist() == dataset.labels.tolist()
    assert (folder / "outcomes.parquet").stat().st_size < 40_000
    kinds = {str(table.schema.field(name).type) for name in table.column_names}
    assert kinds == {"int64", "int32", "bool", "string"}


def test_autoattack_names_what_broke_each_image(full):
    report, table, _ = full
    broken_by, clean, stands = (table[name].to_pylist() for name in ("broken_by", "sa", "ra_autoattack"))
    order = list(report["metrics"]["autoattack"])
    assert order == ["clean", "apgd-ce", "apgd-t", "square", "apgd-t fp32"]
    for attack, right, robust in zip(broken_by, clean, stands, strict=True):
        assert (attack == "clean") is not right and (attack is None) is robust
    counted = [100 * sum(b is None or order.index(b) > n for b in broken_by) / 23 for n in range(len(order))]
    assert counted == pytest.approx([*report["metrics"]["autoattack"].values()])
    sources = report["metrics"]["autoattack_sources"]
    attacked = sum(attack not in (None, "clean") for attack in broken_by)
    assert sources["confirmed"] + sources["again_in_fp32"] + sources["survivors_in_fp32"] == attacked > 0


def test_what_came_from_which_precision_stands_below_the_table(full):
    report = RobustnessReport(**full[0])
    said = report.table().splitlines()[-1]
    confirmed = full[0]["metrics"]["autoattack_sources"]["confirmed"]
    assert said.startswith("AutoAttack searched in half precision.")
    assert f"Images broken: {confirmed} there, confirmed in fp32;" in said
    assert "searched in bf16; each success confirmed in fp32" in report.threat["attacks"]["autoattack"]


def test_a_restart_from_kept_measurements_writes_the_same_record(full, model, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dualmoe.evaluation.processes.run_batches", lambda *args, **kwargs: {}["measured again"])
    report, table = evaluated(model, dataset, tmp_path, **FULL, resume_dir=full[2] / "parts")
    assert table.equals(full[1]) and report["metrics"] == full[0]["metrics"]


def test_kept_measurements_of_an_earlier_format_are_refused(model, dataset, tmp_path):
    """Those of AutoAttack do not say what broke an image."""
    evaluate_robustness(model, dataset, **SETTINGS, level=[], resume_dir=tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    del settings["format of the files"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"format of the files: None there, 2 here.*start over in it with fresh=True"):
        evaluate_robustness(model, dataset, **SETTINGS, level=[], resume_dir=tmp_path)


def test_an_image_that_could_not_be_evaluated_is_empty_and_counts_as_wrong(toy_dual, dataset, tmp_path):
    moe = toy_dual.robust
    labels = moe(dataset.images / 255).logits.argmax(dim=1)
    shy = next(i for i in range(4, 11) if labels[i] != 0)  # where logits are NaN the first class is predicted

    class Picky(nn.Module):
        """Gives NaN for two images, and for a third where it is attacked."""

        def __init__(self):
            super().__init__()
            self.moe, self.bad = moe, dataset.images[[3, 11]] / 255
            self.shy = dataset.images[shy] / 255

        def forward(self, images):
            bad = (images[:, None] - self.bad).abs().amax(dim=(2, 3, 4)).amin(dim=1) < 0.1
            moved = (images - self.shy).abs().amax(dim=(1, 2, 3))
            return torch.where((bad | ((0 < moved) & (moved < 0.1)))[:, None], torch.nan, self.moe(images).logits)

    data = ImageTensorDataset(dataset.images, labels, dataset.class_names)
    report, table = evaluated(Picky().eval(), data, tmp_path, level=[], batch_size=6)
    clean, attacked = table["sa"].to_pylist(), table["ra_pgd2"].to_pylist()
    assert [i for i, right in enumerate(clean) if right is None] == [3, 11] and sum(map(bool, clean)) == 21
    assert [i for i, right in enumerate(attacked) if right is None] == [3, shy, 11]
    assert "3 images failed" in report["failures"]["whole model PGD-2"]
    assert recount(table) == pytest.approx(places(report)) and recount(table)["sa"] == pytest.approx(100 * 21 / 23)


def test_a_choice_of_images_keeps_their_rows(model, dataset, tmp_path):
    report, table = evaluated(model, dataset, tmp_path, level=["dial"], num_images=9, seed=4)
    chosen = dataset.take(9, seed=4)
    assert table["index"].to_pylist() == chosen.rows.tolist() != list(range(9))
    assert table["label"].to_pylist() == chosen.labels.tolist()
    assert table["sa"].to_pylist() == correct_mask(model, chosen).tolist()
    assert recount(table) == pytest.approx(places(report))


def test_what_is_known_of_two_looks_together():
    """Wrong in one is wrong in both, whatever became of the other."""
    right, failed = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([0, 0, 0, 1]).bool()
    other = Outcome(torch.tensor([1, 0, 0, 0]).bool(), torch.tensor([0, 1, 1, 0]).bool())
    both = Outcome(right, failed) & other
    assert both.right.tolist() == [True, False, False, False] and both.failed.tolist() == [False, True, False, False]


def test_columns_hold_their_types_and_the_file_lies_beside_the_report(tmp_path):
    outcomes = Outcomes(torch.tensor([5, 7]), torch.tensor([1, 0]))
    outcomes.add("sa", Outcome(torch.tensor([True, False]), torch.tensor([False, True])))
    outcomes.add_broken_by(torch.tensor([-1, 2]), ["clean", "a", "b"])
    outcomes.save(tmp_path / "new" / "outcomes.parquet")
    table = pq.read_table(tmp_path / "new" / "outcomes.parquet")
    assert table.equals(pa.table(outcomes.columns))
    assert table["sa"].to_pylist() == [True, None] and table["broken_by"].to_pylist() == [None, "b"]
    assert recount(table) == {"sa": 50, "autoattack/clean": 100, "autoattack/a": 100, "autoattack/b": 50}
    assert outcomes_path(tmp_path / "results.json") == tmp_path / "outcomes.parquet"
    assert outcomes_path("runs/best.json").as_posix() == "runs/best-outcomes.parquet"
