"""The dial in the weights: mixing="weights", `merge`, and everything that must know of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import save_and_load, shake
from operations import Operations
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_dualmoe import DualMoEForImageClassification, MoEForImageClassification
from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.components import attack_experts, attack_router
from hf_dualmoe.attacks.folding import foldable_pairs, folded
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.certification.certifier import Certifier, certify
from hf_dualmoe.certification.report import certify_dataset
from hf_dualmoe.certification.smoothing import smoothed_certificates
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.demo.scene import AttackSettings, DemoModel, answers, attack_scene, kept_alphas, new_scene
from hf_dualmoe.demo.words import answers_html, explain
from hf_dualmoe.evaluation.calibration import calibrate_robust_logits
from hf_dualmoe.evaluation.dial import DialedModel, dial_attack, sweep_alpha
from hf_dualmoe.evaluation.evaluation import evaluate_robustness
from hf_dualmoe.evaluation.report import RobustnessReport
from hf_dualmoe.hub.model_card import CardSubject, create_model_card
from hf_dualmoe.hub.onnx import DenseModel, LogitsModel, export_onnx
from hf_dualmoe.models import modeling_dualmoe
from hf_dualmoe.models.merging_dualmoe import interpolate
from hf_dualmoe.models.mixing_dualmoe import mix_logits
from hf_dualmoe.models.parts import at_alpha
from hf_dualmoe.trainer.checks import check_model_fits_method

SMALL = {"backbone": "resnet10t", "num_experts": 2}
FIELDS = {"hard": SMALL, "one expert": {**SMALL, "num_experts": 1}, "dense": {**SMALL, "router_top_k": 2}, "vit": {}}


def moved(model, seed=5):
    """A network that shares a start with `model`."""
    other = copy.deepcopy(model)
    shake(other, seed)
    return other


@pytest.fixture
def make_pair(make_moe):
    """make_pair(alpha=0.3, mixing="weights", **fields): a dual model of two mixtures of one shape; no fields: ViTs."""

    def make(alpha=0.3, mixing="weights", **fields) -> DualMoEForImageClassification:
        robust = make_moe("resnet" if fields else "vit", **fields)
        return DualMoEForImageClassification.from_models(moved(robust), robust, alpha, mixing=mixing)

    return make


@pytest.fixture
def pair(make_pair):
    return make_pair(**SMALL)


def by_hand(model, alpha):
    """The merged network, made the plain way."""
    network = copy.deepcopy(model.robust)
    other = model.standard.state_dict()
    weights = {n: (1 - alpha) * other[n] + alpha * t for n, t in network.state_dict().items() if t.is_floating_point()}
    network.load_state_dict(weights, strict=False)
    return network.eval()


def operations(work):
    """How often each operation runs."""
    with torch.no_grad(), Operations() as counter:
        work()
    return counter


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_answers_are_those_of_the_network_between(fields, make_pair, images):
    model = make_pair(**fields)
    for alpha in (0.3, 0.8):
        expected = by_hand(model, alpha)(images)
        output = model(images, alpha=alpha)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(output.expert_index, expected.expert_index)
    assert output.standard_logits is None and output.robust_logits is None


@pytest.mark.parametrize(("alpha", "name"), [(0, "standard"), (1, "robust")])
def test_ends_of_the_dial_are_one_model_to_the_bit(alpha, name, pair, images):
    assert torch.equal(pair(images, alpha=alpha).logits, getattr(pair, name)(images).logits)


def test_statistics_move_and_counts_stay_those_of_f_r(pair):
    pair.robust.experts[0].bn1.num_batches_tracked.fill_(7)
    merged, parts = pair.merge(0.25), (pair.standard.experts[0].bn1, pair.robust.experts[0].bn1)
    for name in ("running_mean", "running_var", "weight"):
        start, end = (getattr(part, name) for part in parts)
        torch.testing.assert_close(getattr(merged.experts[0].bn1, name), 0.75 * start + 0.25 * end)
    assert merged.experts[0].bn1.num_batches_tracked == 7


def test_a_forward_costs_one_network(pair, images):
    pair(images)
    own, one = operations(lambda: pair(images)), operations(lambda: pair.robust(images))
    assert own.counts["aten.convolution.default"] == one.counts["aten.convolution.default"] > 0
    assert own.total <= one.total + 3


def test_tied_weights_are_interpolated_once():
    class Tied(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)
            self.right.weight = self.left.weight
            nn.init.constant_(self.left.weight, value)

    assert torch.equal(interpolate(Tied(0.0), Tied(1.0), 0.5).right.weight, torch.full((2, 2), 0.5))


# --- when the merged network is made anew ----------------------------------------------------------------------------

CHANGES = {
    "set_alpha": lambda model: model.set_alpha(0.9),
    "config": lambda model: setattr(model.config, "alpha", 0.9),
    "optimizer": lambda model: torch.optim.SGD(model.standard.parameters(), lr=1.0).step(),
    "load_state_dict": lambda model: model.robust.load_state_dict(moved(model.robust, 8).state_dict()),
    "assign": lambda model: model.robust.load_state_dict(moved(model.robust, 8).state_dict(), assign=True),
    "replace": lambda model: setattr(model, "standard", moved(model.standard, 9)),
    "statistics": lambda model: model.robust.experts[0].bn1.running_mean.add_(1.0),
    "data": lambda model: (model.robust.experts[0].bn1.weight.data.add_(1.0), model.eval()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_merged_network_follows_every_change(change, pair, images):
    before = pair(images).logits
    assert pair.merged_network() is pair.merged_network()
    for parameter in pair.standard.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    with torch.no_grad():
        change(pair)
        logits = pair(images).logits
    torch.testing.assert_close(logits, by_hand(pair, pair.config.alpha)(images).logits, atol=1e-4, rtol=1e-4)
    assert (logits - before).abs().max() > 1e-3


def test_copies_have_merged_networks_of_their_own(pair, images):
    logits = pair(images).logits
    twin = copy.deepcopy(pair)
    with torch.no_grad():
        for parameter in twin.robust.parameters():
            parameter.add_(0.1)
    assert not torch.allclose(twin(images).logits, logits)
    assert torch.equal(pair(images).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_to_another_dtype_moves_the_merged_network(dtype, pair, images):
    pair(images)
    pair.to(dtype)
    merged = pair.merged_network()
    assert merged.dtype == dtype
    start, end = pair.standard.experts[1].conv1.weight, pair.robust.experts[1].conv1.weight
    torch.testing.assert_close(merged.experts[1].conv1.weight, torch.lerp(start.double(), end.double(), 0.3).to(dtype))
    assert pair(images).logits.isfinite().all()


def test_merged_network_made_in_inference_mode_can_be_attacked(pair, images):
    with torch.inference_mode():
        pair(images)
    images.requires_grad_(True)
    pair(images).logits.sum().backward()
    assert images.grad.abs().max() > 0


def test_merged_network_is_no_part_of_the_model(pair, images, tmp_path):
    before = len(list(pair.parameters())), set(pair.state_dict()), len(list(pair.modules()))
    logits = pair(images).logits
    assert before == (len(list(pair.parameters())), set(pair.state_dict()), len(list(pair.modules())))
    loaded = save_and_load(pair, tmp_path)
    assert loaded.config.mixing == "weights" and torch.equal(loaded(images).logits, logits)


@pytest.mark.slow
def test_compiled_model_follows_the_dial(make_pair, images):
    pair = make_pair(**SMALL | {"num_experts": 1})
    compiled = torch.compile(pair, backend="eager")
    with torch.no_grad():
        for alpha in (0.3, 0.9):
            pair.set_alpha(alpha)
            torch.testing.assert_close(compiled(images).logits, pair(images).logits)


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["probs", "weights"])
def test_merge_gives_a_plain_model_that_lives_alone(mixing, make_pair, images, tmp_path):
    model = make_pair(mixing=mixing, **SMALL)
    merged = model.merge(0.6)
    assert type(merged) is MoEForImageClassification and not merged.training
    assert all(parameter.requires_grad for parameter in merged.parameters())
    expected = by_hand(model, 0.6)(images).logits
    torch.testing.assert_close(save_and_load(merged, tmp_path)(images).logits, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        merged.router[-1].weight.zero_()
    assert model.robust.router[-1].weight.any()  # nothing is shared


def test_merge_of_a_foreign_architecture(images, tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=7)
    robust, normal = ResNetForImageClassification(config).eval(), {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    constants = {f"{part}_image_{name}": v for part in ("standard", "robust") for name, v in normal.items()}
    model = DualMoEForImageClassification.from_models(moved(robust), robust, 0.3, mixing="weights", **constants)
    mean, std = (torch.tensor(values)[:, None, None] for values in normal.values())
    merged = model.merge()
    assert type(merged) is ResNetForImageClassification
    torch.testing.assert_close(model(images).logits, merged((images - mean) / std).logits)
    torch.testing.assert_close(save_and_load(merged, tmp_path)(images).logits, merged(images).logits)


def test_names_of_the_classes_go_with_the_merged_model(make_moe):
    robust, names = make_moe(**SMALL), {i: f"class {i}" for i in range(7)}
    standard = moved(robust)
    standard.config.id2label = names
    model = DualMoEForImageClassification.from_models(standard, robust, mixing="weights")
    assert model.merge().config.id2label == names and robust.config.id2label != names


# --- what cannot be --------------------------------------------------------------------------------------------------


def foreign_pair(make_moe):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=7)
    return make_moe(**SMALL), ResNetForImageClassification(config).eval()


def renamed(model, names):
    model.config.id2label = {i: names[i] for i in range(7)}
    return model


UNFIT = {
    "experts": ({"num_experts": 3}, {}, r"differ in num_experts \(3 and 2\)"),
    "shape": ({"width": [8, 8, 8, 8]}, {}, r"differ in width \(\[8, 8, 8, 8\] and \[8, 16"),
    "mean": ({"image_mean": 0.1}, {}, r"differ in image_mean \(\[0.1, 0.1, 0.1\] and"),
    "k": ({"router_top_k": 2}, {}, r"differ in router_top_k \(2 and 1\)"),
    "outer mean": (
        {},
        {"robust_image_mean": [0.5] * 3, "robust_image_std": [0.5] * 3},
        r"standard_image_mean=None and robust_image_mean=\[0.5, 0.5, 0.5\] differ",
    ),
    "logit map": ({}, {"robust_logit_map": {"scale": 2.0}}, "logit maps apply to the outputs"),
    "architecture": (None, {}, r"architectures differ \(robust_moe and resnet\)"),
}


@pytest.mark.parametrize(("parts", "fields", "reason"), UNFIT.values(), ids=UNFIT)
def test_what_cannot_be_merged_says_why(parts, fields, reason, make_moe, tmp_path):
    standard, robust = foreign_pair(make_moe) if parts is None else (make_moe(**SMALL | parts), make_moe(**SMALL))
    with pytest.raises(ValueError, match=reason):
        DualMoEForImageClassification.from_models(standard, robust, mixing="weights", **fields)
    model = DualMoEForImageClassification.from_models(standard, robust, **fields)
    with pytest.raises(ValueError, match=f"cannot be merged: .*{reason}"):
        model.merge()
    with pytest.raises(ValueError, match=reason):
        model.set_mixing("weights")
    assert model.config.mixing == "probs"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        DualMoEForImageClassification.from_pretrained(tmp_path, mixing="weights")


def test_weights_of_another_shape_than_the_config_says_are_refused(make_pair):
    model = make_pair(mixing="probs", **SMALL)
    model.standard.router[-1] = nn.Linear(5, 4)
    with pytest.raises(ValueError, match=r"2 weights are missing in one .*router\.1\.weight"):
        model.set_mixing("weights")


@pytest.mark.parametrize("apart", [True, False])
def test_networks_that_were_trained_apart_are_a_warning(apart, make_moe, monkeypatch):
    robust, warned = make_moe(**SMALL), []
    monkeypatch.setattr(modeling_dualmoe.logger, "warning_once", warned.append)
    torch.manual_seed(8)
    standard = MoEForImageClassification(robust.config).eval() if apart else moved(robust)
    DualMoEForImageClassification.from_models(standard, robust).merge()
    assert len(warned) == apart and (not apart or "look trained apart (cosine of their weights" in warned[0])


def test_other_labels_are_refused(make_moe):
    robust = make_moe(**SMALL)
    model = DualMoEForImageClassification.from_models(moved(robust), robust)
    renamed(model.standard, "abcdefg"), renamed(model.robust, "gfedcba")
    model.config.standard, model.config.robust = model.standard.config, model.robust.config
    with pytest.raises(ValueError, match="other labels or another order"):
        model.merge()


def test_one_alpha_for_all_images(pair, images):
    with pytest.raises(ValueError, match=r"alpha has shape \(13, 1\).*one network.*one number"):
        pair(images, alpha=torch.full((13, 1), 0.5))
    torch.testing.assert_close(pair(images, alpha=torch.tensor(0.5)).logits, pair(images, alpha=0.5).logits)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            pair(images, alpha=alpha)
        with pytest.raises(ValueError, match="alpha"):
            pair.merge(alpha)


def test_training_is_refused(pair, images, labels):
    for options in ({"robust_pixel_values": images}, {"extra_expert_index": torch.zeros(13, dtype=torch.int64)}):
        with pytest.raises(ValueError, match=r"dial for trained models.*set_mixing\('weights'\)"):
            pair(images, labels, **options)
    with pytest.raises(ValueError, match="Train with mixing='probs'"):
        pair.train()(images, labels)
    with pytest.raises(ValueError, match="mixing='weights' mixes no outputs"):
        pair.mix(torch.zeros(2, 7), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="mixing='weights' mixes no outputs"):
        mix_logits(torch.zeros(2, 7), torch.zeros(2, 7), 0.5, "weights")


def test_dial_moves_from_outputs_to_weights_and_back(make_pair, images):
    model = make_pair(mixing="probs", **SMALL)
    outputs = model(images).logits
    model.set_mixing("weights")
    assert not torch.allclose(model(images).logits.softmax(1), outputs.softmax(1))
    model.set_mixing("probs")
    assert torch.equal(model(images).logits, outputs)
    with pytest.raises(ValueError, match="mixing='mean' is not one of 'probs', 'logits', 'weights'"):
        model.set_mixing("mean")


def test_loss_of_the_merged_network(pair, images, labels):
    output = pair(images, labels)
    merged = pair.merge()(images)
    expected = F.cross_entropy(merged.logits, labels) + pair.config.robust.router_aux_loss_coef * merged.aux_loss
    torch.testing.assert_close(output.loss, expected)


# --- attacks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_images(images):
    return images[:4]


@pytest.mark.parametrize("fields", [SMALL, FIELDS["one expert"]], ids=["mixture", "one network"])
def test_union_is_that_of_the_merged_network(fields, make_pair, small_images):
    model = make_pair(**fields)
    labels = model(small_images).logits.argmax(dim=1)
    found, plain = (worst_case(m, small_images, labels, eps=0.03, steps=2) for m in (model, model.merge()))
    assert found.members == plain.members and torch.equal(found.robust, plain.robust)
    assert ("route to expert 1" in found.members) == (fields is SMALL)


@pytest.mark.parametrize("strike", [attack_experts, attack_router], ids=["experts", "router"])
def test_component_attacks_are_those_of_the_merged_network(strike, pair, small_images):
    options = {"attack": PGD(eps=0.03, steps=2, seed=0)} if strike is attack_experts else {"eps": 0.03, "steps": 2}
    labels = torch.arange(4)
    found, plain = (strike(model, small_images, labels, **options) for model in (pair, pair.merge()))
    torch.testing.assert_close(found, plain)


def test_batchnorm_of_the_merged_network_is_folded_and_a_turn_of_the_dial_does_no_harm(pair, small_images):
    before, other = pair(small_images).logits, pair.merge(0.9)(small_images).logits
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in pair.robust.modules())
    assert 0 < len(foldable_pairs(pair, small_images)) <= norms
    assert len(foldable_pairs(DialedModel(pair, 0.3), small_images)) == len(foldable_pairs(pair, small_images))
    with torch.no_grad(), frozen(pair), folded(pair, small_images):
        torch.testing.assert_close(pair(small_images).logits, before, atol=1e-4, rtol=1e-4)
        assert operations(lambda: pair(small_images)).counts["aten.native_batch_norm.default"] < norms
        torch.testing.assert_close(pair(small_images, alpha=0.9).logits, other)
    assert torch.equal(pair(small_images).logits, before)


def test_who_watches_f_r_does_not_watch_the_merged_network(pair, small_images):
    seen = []
    pair.robust.register_forward_hook(lambda *_: seen.append("F_R"))
    pair(small_images)
    assert not seen
    PGD(eps=0.01, steps=1)(LogitsModel(pair), small_images, torch.arange(4))  # folding watches what it wraps


def test_at_alpha_leaves_the_model_alone(pair, images):
    twin = at_alpha(pair, 0.9)
    assert (twin.config.alpha, pair.config.alpha) == (0.9, 0.3)
    assert torch.equal(twin(images).logits, pair(images, alpha=0.9).logits)
    assert twin.robust is pair.robust


# --- everything else that knows of the dial --------------------------------------------------------------------------


def test_sweep_and_report_along_the_dial(pair, images, labels):
    data = ImageTensorDataset((255 * images).round().byte(), labels, [f"LABEL_{i}" for i in range(7)])
    sweep = sweep_alpha(pair, data, attack=dial_attack(7, eps=0.01, steps=1), alphas=(0.0, 0.5, 1.0), progress=False)
    for point in sweep:
        right = pair.merge(point["alpha"])(data.images / 255).logits.argmax(dim=1) == labels
        assert point["sa"] == pytest.approx(100 * right.double().mean().item())
    assert pair.config.alpha == 0.3
    parts = ("components", "dial", "component_attacks", "worst_case")
    report = evaluate_robustness(pair, data, eps=0.01, steps=1, level=parts, alphas=(0.0, 0.5), progress=False)
    assert not report.failures and report.model["mixing"] == "weights"
    found, expected = ([(p["alpha"], p["sa"]) for p in points] for points in (report.alpha_sweep, sweep[:2]))
    assert found == expected
    assert set(report.metrics["components"]) == {"standard", "robust"}
    assert len(report.metrics["expert_load"]["clean"]) == 2
    assert "alpha=0.9" not in report.metrics["worst_case"]["members"]
    assert report.cost["whole model at alpha=0.3 clean"]["forward"] == 1.0


def test_calibration_of_outputs_is_refused(pair, images, labels):
    data = ImageTensorDataset((255 * images).byte(), labels, [str(i) for i in range(7)])
    with pytest.raises(ValueError, match="mixing='weights'; calibration needs a dual model with mixing='probs'"):
        calibrate_robust_logits(pair, data, attack=PGD(eps=0.01, steps=1))


def test_certificates_are_those_of_the_merged_network(make_pair, images):
    model = make_pair(backbone="lipschitz_mlp", width=None, backbone_kwargs={"hidden_sizes": [8]}, num_experts=1)
    for alpha in (None, 0.8):
        found, plain = certify(model, images, alpha=alpha), certify(model.merge(alpha), images)
        torch.testing.assert_close(found.radius, plain.radius, equal_nan=True)
        assert torch.equal(found.prediction, plain.prediction)
    assert found.radius.max() > 0
    certifier = Certifier(model)
    with pytest.raises(ValueError, match=r"certify model\.merge\(alpha\)"):
        certifier(images, alpha=0.8)
    votes = {"sigma": 0.1, "n0": 2, "n": 20}
    found = smoothed_certificates(model, images, alpha=0.2, **votes)
    assert torch.equal(found.prediction, smoothed_certificates(model.merge(0.2), images, **votes).prediction)


def test_certificates_of_a_dataset_name_each_merged_network(make_pair, images, labels, tmp_path):
    model = make_pair(backbone="lipschitz_mlp", width=None, backbone_kwargs={"hidden_sizes": [8]}, num_experts=1)
    data = ImageTensorDataset((255 * images).byte(), labels, [str(i) for i in range(7)])
    settings = {"sigmas": (0.1,), "n0": 2, "n": 20, "check_names": False, "progress": False, "resume_dir": tmp_path}
    report = certify_dataset(model, data, alphas=(0.25, 1.0), **settings)
    proofs = ["F_S alone", "F_R alone", "merged, alpha = 0.25", "merged, alpha = 1"]
    assert [entry["name"] for entry in report.entries] == [*proofs, "merged at alpha = 0.3 smoothed, sigma = 0.1"]
    assert report.entries[1]["sa"] == report.entries[3]["sa"] and not report.failures
    model.set_alpha(0.9)  # another network, which must not get the votes of the one before
    entries = certify_dataset(model, data, alphas=(0.25,), **settings).entries
    assert entries[-1]["name"].startswith("merged at alpha = 0.9")


def test_other_tools_get_the_merged_network(pair, images):
    with torch.no_grad():
        expected = pair(images, alpha=0.9).logits
        torch.testing.assert_close(DenseModel(pair, 0.9)(images), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(LogitsModel(pair, 0.9)(images), expected)
    assert sum(p.numel() for p in DenseModel(pair).parameters()) == sum(p.numel() for p in pair.robust.parameters())


def test_onnx_file_with_a_dial_is_refused(pair, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="the network of one alpha; write one file for each"):
        export_onnx(pair, tmp_path / "model.onnx", dial_input=True)


@pytest.mark.slow
def test_onnx_file_holds_one_network(make_pair, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = make_pair(**SMALL | {"num_experts": 1, "image_size": 10})
    assert export_onnx(model, tmp_path / "model.onnx", alpha=0.9) <= 1e-4
    size = sum(4 * p.numel() for p in model.robust.parameters())
    assert (tmp_path / "model.onnx").stat().st_size < 1.8 * size


def test_trainer_refuses_it_before_training(pair):
    with pytest.raises(ValueError, match=r"method='jtdmoe' cannot train with mixing='weights'"):
        check_model_fits_method(pair, "jtdmoe")


def test_demo_asks_the_merged_network(pair, images, monkeypatch):
    demo = DemoModel(pair, None, "tiny", [str(i) for i in range(7)], 3)
    scene = new_scene(demo, images[:1])
    assert torch.equal(scene.clean_look.logits["F_S"], pair.standard(images[:1]).logits[0])
    assert set(scene.clean_look.routes) == {"F_S", "F_R"}
    probs = answers(demo, scene.clean_look, 0.6)
    torch.testing.assert_close(probs["F_D"], pair.merge(0.6)(images[:1]).logits[0].softmax(0))
    scene = attack_scene(demo, scene, AttackSettings(0.05, "linf", 2, "F_D", 0.6))
    kept = kept_alphas(demo, scene, steps=4)
    answer = {a: [int(pair(x, alpha=a).logits.argmax()) for x in (scene.clean, scene.attacked)] for a in (0, 0.5, 1)}
    assert [a in kept for a in answer] == [clean == attacked for clean, attacked in answer.values()]
    assert "0.40 · F_S + 0.60 · F_R, weight by weight" in answers_html(demo, scene, 0.6)
    assert "weights between those of both" in explain(demo, new_scene(demo, images[:1]), 0.6)


def test_card_says_which_dial_it_is():
    unknown = {"dataset": {"name": "digits"}, "threat": {}}
    report = RobustnessReport(
        model={"kind": "dual model", "alpha": 0.5, "mixing": "weights"}, metrics={"sa": 70.0}, **unknown
    )
    config = {"model_type": "dual_moe", "mixing": "weights", "alpha": 0.5, "auto_map": {}}
    card = create_model_card(report, CardSubject("tiny", config=config)).content
    assert "one network answers, whose weights lie between" in card and "Any answer costs one network" in card
    assert "model.merge(0.8).save_pretrained" in card and "two classifiers in one" not in card
    assert "Read before you trust" not in card
    other = create_model_card(report, CardSubject("tiny", config={**config, "mixing": "probs"})).content
    assert "two classifiers in one" in other and "model.merge" not in other
    assert "measured with mixing = weights, but the saved model has mixing = probs" in other
