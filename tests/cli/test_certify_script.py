"""`training/certify.py` and `certify_dataset` on tiny saved models: outputs, restart, refusals, two processes."""

import json
from functools import partial

import pytest
import scripts
import torch

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.certification.certifier import Certifier
from hf_dualmoe.certification.report import CertificationReport, certify_dataset
from hf_dualmoe.data.datasets import load_splits, to_unit_range
from training import certify as script

certify = partial(scripts.call, script)
NAMES = {"id2label": {i: str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)}}
SIZES = {"num_labels": 10, "image_size": 8, "num_channels": 1, **NAMES}
QUICK = "--max_test_samples 41 --disable_tqdm --radii 0.001 0.02 --batch_size 16".split()


def lipschitz_moe(num_experts=2, **fields):
    backbone = {"backbone": "lipschitz_mlp", "backbone_kwargs": {"hidden_sizes": [32], "logit_scale": 5.0}}
    return MoEForImageClassification(MoEConfig(**SIZES, **backbone, num_experts=num_experts, **fields)).eval()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    vit = {"backbone_kwargs": {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 3}}
    standard = MoEForImageClassification(MoEConfig(**SIZES, **vit, backbone="vit_tiny_patch16_224", num_experts=1))
    return {
        "moe": lipschitz_moe(),
        "dual": DualMoEForImageClassification.from_models(standard.eval(), lipschitz_moe(), alpha=0.8),
        "vit": standard,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, models):
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return folder


def test_dual_model_end_to_end(saved, models, tmp_path, capsys):
    command = [*QUICK, "--model", saved / "dual", "--output_dir", tmp_path, "--alphas", 0.6, 0.9, 0.4]
    command += ["--sigmas", 0.05, "--n", 60, "--n0", 10]
    assert certify(*command) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"certificates.json", "certified_accuracy.png", "measurements"}
    report = CertificationReport.load(tmp_path / "certificates.json")
    out = capsys.readouterr().out
    cost = "Cost: at most 0 gradient and 70 forward passes per image on 41 images, about"
    assert 0 <= out.find(cost) < out.index(report.table())
    assert "NOT APPLICABLE: F_S alone: VisionTransformer contains self-attention" in out
    entries = {entry["name"]: entry for entry in report.entries}
    assert list(entries) == [
        *("F_S alone", "F_R alone", "dual, alpha = 0.6", "dual, alpha = 0.9", "dual, alpha = 0.4"),
        *("F_R smoothed, sigma = 0.05", "dual over F_R smoothed, sigma = 0.05, alpha = 0.6"),
        "dual over F_R smoothed, sigma = 0.05, alpha = 0.9",
    ]
    assert entries["F_S alone"]["certified"] is None and entries["F_S alone"]["status"]["not applicable"] == 41
    assert entries["dual, alpha = 0.4"]["certified"] is None
    at_most = entries["dual, alpha = 0.9"]
    assert at_most["rule"] == {"dual over hard gate": 41 - at_most["status"]["abstain"]}
    assert entries["F_R smoothed, sigma = 0.05"]["confidence"] == 0.999

    data = load_splits("digits").test.take(41, seed=0)
    direct = Certifier(models["dual"].robust)(to_unit_range(data.images))
    assert entries["F_R alone"]["certified"] == pytest.approx(direct.certified_accuracy(data.labels, [0.001, 0.02]))
    for entry in report.entries:
        if entry["certified"]:
            low, high = entry["intervals"][0]
            assert low <= entry["certified"][0] <= high and entry["certified"][0] >= entry["certified"][1]
            assert entry["curve"]["accuracy"] == sorted(entry["curve"]["accuracy"], reverse=True)
            assert sum(entry["status"].values()) == 41


def test_restart_measures_nothing_twice_and_other_settings_are_refused(saved, tmp_path, capsys, monkeypatch):
    command = [*QUICK, "--model", saved / "moe", "--output_dir", tmp_path]
    assert certify(*command) == 0
    first = CertificationReport.load(tmp_path / "certificates.json")
    assert first.entries[0]["certified"][0] > 0 and first.entries[0]["rule"]["hard gate"] > 0
    monkeypatch.setattr(Certifier, "__call__", lambda *_: pytest.fail("certified again"))
    assert certify(*command, "--radii", 0.002) == 0  # radii are read off what is there
    assert len(CertificationReport.load(tmp_path / "certificates.json").entries[0]["certified"]) == 1
    capsys.readouterr()
    assert certify(*command, "--max_test_samples", 20) == 2
    assert "holds measurements made with other settings" in capsys.readouterr().err
    monkeypatch.undo()


def test_model_without_a_theorem_says_so_and_has_no_numbers(saved, tmp_path, capsys):
    assert certify(*QUICK, "--model", saved / "vit", "--output_dir", tmp_path) == 0
    assert "NOT APPLICABLE: model: VisionTransformer contains self-attention" in capsys.readouterr().out
    entry = json.loads((tmp_path / "certificates.json").read_text())["entries"][0]
    assert entry["certified"] is None and entry["curve"] is None and entry["median_radius"] is None
    assert not (tmp_path / "certified_accuracy.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--radii", "0"], "radii=[0.0] must hold at least one value, all > 0"),
        (["--alphas", "1.2"], "alphas=[1.2] must hold at least one value, each in [0, 1]"),
        (["--sigmas", "0"], "sigma=0.0 must be finite and > 0"),
        (["--sigmas", "0.1", "--norm", "linf"], "smoothing certifies in L2 only"),
        (["--n", "0"], "n=0 must be an integer of at least 1"),
        (["--confidence", "1"], "confidence=1.0 must be in (0, 1)"),
        (["--max_test_samples", "99999"], "max_test_samples=99999, but the dataset has"),
        (["--radii", "1/0"], "invalid pixel_radius value"),
        (["--norm", "l2", "--radii", "0.1", "36"], "radii=36.0 is larger than 8, "),
        (["--model", "./no-model"], "no-model"),
    ],
    ids=str,
)
def test_bad_input_is_refused_without_traceback(saved, arguments, message, tmp_path, capsys):
    assert certify(*QUICK, "--model", saved / "moe", "--output_dir", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "usage:" not in error
    assert not (tmp_path / "out" / "certificates.json").exists()


def test_certificates_of_another_program_are_not_replaced(saved, tmp_path, capsys):
    path = tmp_path / "certificates.json"
    path.write_text('[{"subject": "CN=example.org"}]')
    assert certify(*QUICK, "--model", saved / "moe", "--output_dir", tmp_path, "--fresh") == 2
    assert f"{path} would be replaced, and hf_dualmoe did not write it" in capsys.readouterr().err
    assert path.read_text() == '[{"subject": "CN=example.org"}]'


def test_train_mode_is_refused(models):
    model = lipschitz_moe().train()
    with pytest.raises(ValueError, match="train mode"):
        certify_dataset(model, load_splits("digits").test, progress=False)


@pytest.mark.slow
def test_two_processes_find_what_one_does(saved, tmp_path):
    """41 images: 21 and 20."""
    options = [*QUICK, "--model", saved / "dual", "--sigmas", 0.05, "--n", 50, "--n0", 10, "--alphas", 0.7]
    result = scripts.launch(script.__file__, *options, "--output_dir", tmp_path / "two")
    assert scripts.output_of(result).count("Saved to") == 1
    assert certify(*options, "--output_dir", tmp_path / "one") == 0
    one, two = (CertificationReport.load(tmp_path / name / "certificates.json") for name in ("one", "two"))
    assert (one.environment["processes"], two.environment["processes"]) == (1, 2)
    for mine, other in zip(one.entries, two.entries, strict=True):
        assert mine["name"] == other["name"] and mine["status"] == other["status"]
        if mine["certified"]:
            assert mine["certified"] == pytest.approx(other["certified"], abs=2.5)  # an image at the radius itself
            assert mine["median_radius"] == pytest.approx(other["median_radius"], rel=1e-3)
