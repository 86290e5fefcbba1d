"""Reports: numbers recomputed by hand, every level, restart, refusals, bad images, JSON and table."""

import copy
import json
import warnings

import pytest
import torch
from conftest import assert_same_trace, trace
from torch import nn

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.components import attack_experts, attack_router
from hf_dualmoe.attacks.members import member_names
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.evaluation import evaluation, work
from hf_dualmoe.evaluation import measurements as parts
from hf_dualmoe.evaluation.batches import correct_mask, run_batches
from hf_dualmoe.evaluation.dial import DialedModel, dial_attack
from hf_dualmoe.evaluation.environment import check_class_names, data_digest, describe_model
from hf_dualmoe.evaluation.evaluation import LEVELS, RobustnessReport, evaluate_robustness
from hf_dualmoe.evaluation.memory import is_out_of_memory
from hf_dualmoe.evaluation.metrics import wilson_interval
from hf_dualmoe.evaluation.plots import plot_tradeoff
from hf_dualmoe.evaluation.processes import Processes
from hf_dualmoe.evaluation.sanity import Check
from hf_dualmoe.evaluation.store import Found
from hf_dualmoe.models.loading import load_classifier

EPS = 0.02
QUIET = {"eps": EPS, "steps": 2, "progress": False}
SMALL = {**QUIET, "sanity_images": 8, "autoattack_version": "fast", "alphas": (0.0, 0.6, 1.0)}


@pytest.fixture(scope="module")
def model(toy_dual):
    return toy_dual


@pytest.fixture(scope="module")
def moe(toy_dual):
    return toy_dual.robust


@pytest.fixture(scope="module")
def dataset(toy_data):
    return toy_data


@pytest.fixture(autouse=True)
def few_queries(monkeypatch):
    monkeypatch.setattr(evaluation, "SANITY", {"quick": {"num_images": 8, "square_queries": 5}})
    monkeypatch.setattr(evaluation, "SANITY_DEFAULT", {"num_images": 8, "square_queries": 5})


@pytest.fixture(scope="module")
def report(model, dataset):
    return evaluate_robustness(model, dataset, eps=EPS, steps=3, dataset_name="toy", progress=False)


def test_a_foreign_component_is_measured_behind_its_normalisation(native_vit, make_moe, images):
    """As the dual model runs it: the number for F_S alone is that of alpha = 0."""
    moe = make_moe("resnet", num_experts=2)
    dual = DualMoEForImageClassification.from_models(
        native_vit, moe, 0.6, standard_image_mean=[0.5] * 3, standard_image_std=[0.01] * 3
    ).eval()
    with torch.no_grad():
        labels = dual(images, alpha=0).logits.argmax(dim=1)
    data = ImageTensorDataset((255 * images).round().byte(), labels, [*map(str, range(dual.config.num_labels))])
    with torch.no_grad():
        right = dual(data.images / 255, alpha=0).logits.argmax(dim=1) == labels
    options = {**QUIET, "alphas": (0.0, 1.0), "level": ["components", "dial"], "check_names": False}
    report = evaluate_robustness(dual, data, **options)
    assert report.metrics["components"]["standard"]["sa"] == pytest.approx(100 * float(right.float().mean()))
    assert report.alpha_sweep[0]["sa"] == report.metrics["components"]["standard"]["sa"] > 90


@pytest.mark.parametrize("kind", ["mixture", "dual model", "1-Lipschitz", "dial in the weights", "foreign", "half"])
def test_a_saved_model_is_described_as_it_was_in_memory(kind, make_moe, make_dual, toy_dual, native_vit, tmp_path):
    """Else the report of its training would be taken for one on another model."""
    if kind == "foreign":
        native_vit.save_pretrained(tmp_path / "start")
        model = load_classifier(tmp_path / "start", image_mean=0.5, image_std=0.25)
    else:
        moe = make_moe()
        merged = DualMoEForImageClassification.from_models(moe, copy.deepcopy(moe), alpha=0.5, mixing="weights")
        kinds = {"mixture": moe, "dual model": make_dual(), "1-Lipschitz": toy_dual, "dial in the weights": merged}
        make_moe().bfloat16().save_pretrained(tmp_path / "half")
        model = kinds.get(kind) or load_classifier(tmp_path / "half", dtype="auto")
    model.save_pretrained(tmp_path / "saved")
    normalisation = {"image_mean": 0.5, "image_std": 0.25} if kind == "foreign" else {}
    loaded = load_classifier(tmp_path / "saved", **normalisation)  # in float32, as an evaluation does
    assert describe_model(loaded) == describe_model(model)
    with torch.no_grad():
        next(loaded.parameters()).view(-1)[0].add_(1)
    assert describe_model(loaded)["weights"] != describe_model(model)["weights"]


def test_correct_mask_matches_a_loop_over_images(model, dataset):
    attack = PGD(eps=EPS, steps=3, seed=0)
    mask = correct_mask(model, dataset, attack=attack, batch_size=7)
    for i in range(len(dataset)):
        image, label = dataset.images[i : i + 1] / 255, dataset.labels[i : i + 1]
        attacked = attack(model, image, label, ids=torch.tensor([i]))
        assert bool(model(attacked).logits.argmax() == label) == bool(mask[i]), i


@pytest.mark.parametrize("kind", ["dual", "batchnorm"])
def test_a_training_model_is_warned_about_and_left_to_the_bit_as_it_was(kind, toy_dual, dataset):
    model, level = copy.deepcopy(toy_dual), "standard"
    if kind == "batchnorm":
        tiny = {"width": [8] * 4, "num_labels": 4, "image_size": 10, "num_channels": 1, "num_experts": 2}
        model, level = MoEForImageClassification(MoEConfig(**tiny)).eval(), []
    settings = {**QUIET, "steps": 1, "num_images": 6, "sanity_images": 2, "alphas": (0.3,), "level": level}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = evaluate_robustness(model, dataset, **settings).metrics
    model.train()
    mixture = model.standard if kind == "dual" else model
    mixture.experts[1].eval()  # modules may differ
    mixture.router.requires_grad_(False)
    mixture.experts[0].requires_grad_(False)
    mixture.router[-1].bias.grad = torch.full((2,), 3.0)
    before, random_state = trace(model), torch.get_rng_state()
    with pytest.warns(UserWarning, match="train mode; it is evaluated in eval mode"):
        report = evaluate_robustness(model, dataset, **settings)
    assert_same_trace(model, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert report.metrics == expected and not report.failures


def test_the_report_does_not_depend_on_the_batch_size(model, dataset):
    level = ["components", "dial", "component_attacks", "eps_curve"]
    data = dataset.take(9)
    reports = [evaluate_robustness(model, data, level=level, batch_size=n, **QUIET) for n in (1, 4, 9)]
    for report in reports[1:]:
        assert report.metrics == reports[0].metrics and report.alpha_sweep == reports[0].alpha_sweep


def test_report_holds_components_dial_and_routing(model, dataset, report):
    key = "ra_pgd3"
    assert report.metrics["components"]["standard"]["sa"] == pytest.approx(100 * 18 / 23, abs=1e-4)
    sweep = {point["alpha"]: point for point in report.alpha_sweep}
    assert list(sweep) == [0.0, 0.5, 0.75, 0.9, 1.0]
    for alpha, name in ((0.0, "standard"), (1.0, "robust")):
        attack = PGD(eps=EPS, steps=3, seed=0)
        clean = correct_mask(DialedModel(model, alpha), dataset)
        attacked = correct_mask(DialedModel(model, alpha), dataset, attack=attack)
        expected = {"sa": 100 * clean.float().mean(), key: 100 * (clean & attacked).float().mean()}
        for metric, value in expected.items():
            assert sweep[alpha][metric] == pytest.approx(float(value), abs=1e-4)
            assert report.metrics["components"][name][metric] == pytest.approx(float(value), abs=1e-4)
    assert all(point[key] <= point["sa"] for point in report.alpha_sweep)
    for load in report.metrics["expert_load"].values():
        assert sum(load) == pytest.approx(100, abs=0.02)
    clean = dataset.images / 255
    attacked = PGD(eps=EPS, steps=3, seed=0)(model.robust, clean, dataset.labels)
    routes = [model.robust.route(images).argmax(dim=1) for images in (clean, attacked)]
    shares = {
        name: 100 * float((r == 0).float().mean()) for name, r in zip(("clean", "attacked"), routes, strict=True)
    }
    for name, share in shares.items():
        assert report.metrics["expert_load"][name][0] == pytest.approx(share, abs=0.01)
    flips = 100 * float((routes[0] != routes[1]).float().mean())
    assert report.metrics["route_flip_rate"] == pytest.approx(flips, abs=1e-4)
    assert report.threat["eps"] == EPS
    assert report.dataset["num_images"] == 23
    assert report.failures == {}


def test_intervals_and_cost_are_those_of_the_counts(report):
    robust = round(report.metrics["ra_pgd3"] * 23 / 100)
    assert report.metrics["intervals"]["sa"] != report.metrics["intervals"]["ra_pgd3"]
    assert report.metrics["intervals"]["ra_pgd3"] == pytest.approx(wilson_interval(robust, 23), abs=1e-3)
    cost = report.cost["standard PGD-3"]
    assert cost["gradient"] == 3 and cost["forward"] == 6  # 3 steps, clean, the last iterate, the judgement
    assert report.cost["standard clean"]["forward"] == 1
    assert report.cost["total"]["gradient"] == sum(c["gradient"] for n, c in report.cost.items() if n != "total")


def test_full_level_recomputed(model, dataset, tmp_path, monkeypatch):
    report = evaluate_robustness(model, dataset, **SMALL, level="full", resume_dir=tmp_path)
    assert report.failures == {}
    metrics, images = report.metrics, dataset.images / 255
    attack, ball = PGD(eps=EPS, steps=2, seed=0), {"eps": EPS, "steps": 2, "seed": 0}
    clean = correct_mask(model, dataset)
    union = worst_case(model, images, dataset.labels, **ball)
    attacked = {
        "ra_expert_pgd2": attack_experts(model, images, dataset.labels, attack=attack),
        "ra_router_pgd2": attack_router(model, images, dataset.labels, **ball),
        "ra_adaptive_union": union.adversarial,
    }
    for name, points in attacked.items():
        right = model(points).logits.argmax(dim=1) == dataset.labels
        assert metrics[name] == pytest.approx(100 * float((right & clean).float().mean()), abs=1e-4), name
    members = metrics["worst_case"]["members"]
    for name, value in union.members.items():
        assert members[name] == pytest.approx(value)
    assert members["pgd2"] == metrics["ra_pgd2"] and members["autoattack"] == metrics["ra_autoattack"]
    assert metrics["ra_worst_case"] <= min(members.values())
    assert metrics["autoattack"]["square"] == pytest.approx(metrics["ra_autoattack"], abs=1e-4)
    curve = metrics["eps_curve"]
    assert [p["eps"] for p in curve] == pytest.approx([0, EPS / 4, EPS / 2, EPS, 1.5 * EPS, 2 * EPS])
    assert curve[0]["ra_pgd2"] == metrics["sa"] and curve[3]["ra_pgd2"] == metrics["ra_pgd2"]
    assert {"worst_case", "eps_monotone", "autoattack random_output"} <= set(report.sanity)
    assert report.cost["worst case 2 steps at alpha=0.6"]["gradient"] == pytest.approx(union.passes["gradient"])
    assert report.cost["expert attack PGD-2 at alpha=0.6"]["gradient"] == 2
    assert "fast" in report.threat["attacks"]["autoattack"]
    assert json.loads(json.dumps(report.__dict__)) == report.__dict__
    assert not [path for path in tmp_path.iterdir() if "part-0-of-1" in path.name]  # AutoAttack's own state

    names = ("autoattack_union", "union_member", "on_experts", "on_router", "classify", "run_sanity_checks")
    for name in names:
        monkeypatch.setattr(parts, name, lambda *args, **kwargs: lambda *batch: {}["measured again"])
    again = evaluate_robustness(model, dataset, **SMALL, level="full", resume_dir=tmp_path)
    for name in ("metrics", "alpha_sweep", "sanity", "suspicious", "failures", "cost", "threat"):
        assert getattr(again, name) == getattr(report, name), name
    # the time of all starts, not that of the last alone, which only reads
    assert again.environment["wall_time_s"] >= report.cost["total"]["seconds"]


def test_what_is_wrong_when_clean_is_not_robust_whatever_an_attack_finds(model, dataset, monkeypatch):
    def harmless(*args):
        return lambda images, labels, ids: {"right": torch.ones_like(labels, dtype=torch.bool)}

    monkeypatch.setattr(parts, "on_experts", harmless)
    monkeypatch.setattr(parts, "on_router", harmless)
    metrics = evaluate_robustness(model, dataset, **QUIET, level=["component_attacks"]).metrics
    assert metrics["ra_expert_pgd2"] == metrics["ra_router_pgd2"] == metrics["sa"] < 100


def test_report_survives_json_and_is_written_as_numbers_come(model, dataset, report, tmp_path, monkeypatch):
    path = tmp_path / "sub" / "results.json"
    report.save(path)
    assert RobustnessReport.load(path) == report
    assert not list(path.parent.glob("*.partial"))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "DialedModel", killed)
    early = tmp_path / "early.json"
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(model, dataset, eps=EPS, steps=3, path=early, progress=False)
    saved = json.loads(early.read_text())
    assert saved["metrics"]["components"]["robust"] == report.metrics["components"]["robust"]


def test_a_failure_loses_no_other_measurement_and_a_restart_repeats_none(model, dataset, tmp_path, monkeypatch):
    small = {**SMALL, "level": ["components", "dial", "component_attacks", "worst_case"]}
    options = {**small, "path": tmp_path / "results.json", "resume_dir": tmp_path / "parts"}
    expected = evaluate_robustness(model, dataset, **small)

    def break_down(*args, **kwargs):
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(work, "worst_case", break_down)
        patch.setattr(work, "attack_router", break_down)
        broken = evaluate_robustness(model, dataset, **options)
    assert set(broken.failures) == {"worst case 2 steps at alpha=0.6", "router attack PGD-2 at alpha=0.6"}
    assert all(message == "RuntimeError: the disk is full" for message in broken.failures.values())
    assert "ra_router_pgd2" not in broken.metrics and "ra_adaptive_union" not in broken.metrics
    assert broken.metrics["ra_expert_pgd2"] == expected.metrics["ra_expert_pgd2"]
    assert broken.sanity.keys() == expected.sanity.keys()
    assert "FAILED" in "\n".join(broken.notes())

    repeated = []

    def spy(work, *args, **kwargs):
        repeated.append(work)
        return run_batches(work, *args, **kwargs)

    monkeypatch.setattr("hf_dualmoe.evaluation.processes.run_batches", spy)
    again = evaluate_robustness(model, dataset, **options)
    members = member_names(model, 4)
    assert len(repeated) == 1 + len(members)  # what had failed, of the union the first member already
    assert again.failures == {}
    for name in ("metrics", "alpha_sweep", "sanity", "alpha_choice", "suspicious"):
        assert getattr(again, name) == getattr(expected, name), name
    assert RobustnessReport.load(tmp_path / "results.json") == again

    repeated.clear()  # another position of the dial leaves components and sweep finished
    turned = copy.deepcopy(model)
    turned.set_alpha(1.0)
    evaluate_robustness(turned, dataset, **{**options, "level": "quick"})
    assert len(repeated) == 4  # the whole model, and the dial at 0.6, each clean and attacked


def test_finished_work_of_other_settings_is_refused(model, moe, dataset, tmp_path):
    options = {**QUIET, "resume_dir": tmp_path}
    evaluate_robustness(moe, dataset, **options)
    other = dataset.subset(range(20))
    for changed, what in (
        ((moe, dataset, {**options, "steps": 3}), "attack: .*steps=2.* there, .*steps=3.* here"),
        ((moe, other, options), "images: "),
        ((model, dataset, options), "model: "),
    ):
        with pytest.raises(ValueError, match=f"resume_dir=.*other settings \\({what}.*--fresh"):
            evaluate_robustness(*changed[:2], **changed[2])
    evaluate_robustness(moe, dataset, **{**options, "steps": 3}, fresh=True)
    parts_done = ("whole-model-clean", "whole-model-pgd-3", "sanity-checks-8-images-square-queries=5")
    assert {p.name for p in tmp_path.iterdir()} == {"settings.json", *(f"{part}.safetensors" for part in parts_done)}
    (tmp_path / "whole-model-pgd-3.safetensors").write_bytes(b"half a file")
    report = evaluate_robustness(moe, dataset, **{**options, "steps": 3})
    assert report.failures == {} and "ra_pgd3" in report.metrics


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_keeps_its_files(moe, dataset, fresh, tmp_path):
    """fresh deleted the weights of a model whose folder was given by mistake."""
    moe.save_pretrained(tmp_path)
    for text in ("{}", "[1]", "broken", ""):
        with pytest.raises(ValueError, match="resume_dir=.* holds .*, and nothing says that it is of an evaluation"):
            evaluate_robustness(moe, dataset, **QUIET, resume_dir=tmp_path, fresh=fresh)
        (tmp_path / "settings.json").write_text(text)  # of another program
    assert (tmp_path / "model.safetensors").is_file()


class Narrow(nn.Module):
    """A classifier that runs out of memory with more than `most` images, and counts the images that it is shown."""

    def __init__(self, most, error=None):
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.most, self.sizes = nn.Linear(100, 4), most, []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def forward(self, images):
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise self.error
        return self.linear(images.flatten(1))


def test_where_memory_runs_out_batches_are_halved_and_the_report_says_so(dataset, caplog):
    settings = {**QUIET, "check_names": False, "level": ["worst_case", "autoattack"], "autoattack_version": "fast"}
    wide, narrow = Narrow(100), Narrow(8, RuntimeError("CUDA error: out of memory"))
    found = run_batches(parts.classify(narrow), dataset, torch.arange(23), batch_size=23, device=torch.device("cpu"))
    assert narrow.sizes == [23, 11, 5, 5, 5, 5, 3] and found.rows.tolist() == list(range(23))
    assert not found.failed.any() and "error" not in found.texts
    expected = evaluate_robustness(wide, dataset, batch_size=6, **settings)
    narrow.most = 6  # the look at the first batch, before anything is measured, still fits
    with caplog.at_level("WARNING"):
        report = evaluate_robustness(Once(narrow), dataset, batch_size=12, **settings)
    assert report.metrics == expected.metrics and not report.failures
    assert report.environment["smaller_batches"] == {
        "whole model clean": "12 images did not fit into memory; batches of 6"
    }
    assert sum("Out of memory" in record.message for record in caplog.records) == 1
    assert "MEMORY: whole model clean: 12 images did not fit into memory; batches of 6" in report.notes()


class Once(nn.Module):
    """Lets the first look through, whatever its size."""

    def __init__(self, model):
        super().__init__()
        self.model, self.first = model, True

    def forward(self, images):
        if self.first:
            self.first = False
            return self.model.linear(images.flatten(1))
        return self.model(images)


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    ],
)
def test_memory_runs_out_in_many_words(words):
    assert is_out_of_memory(RuntimeError(words)) and not is_out_of_memory(ValueError(words))


def test_autoattack_goes_on_with_smaller_batches(dataset):
    class Later(Narrow):
        def forward(self, images):
            self.most = 6 if len(self.sizes) > 12 else 100
            return super().forward(images)

    settings = {**QUIET, "check_names": False, "level": ["autoattack"], "autoattack_version": "fast"}
    report = evaluate_robustness(Later(0), dataset, batch_size=23, **settings)
    expected = evaluate_robustness(Narrow(100), dataset, batch_size=5, **settings)
    assert report.metrics == expected.metrics and not report.failures
    assert list(report.environment["smaller_batches"].values())[-1].endswith("batches of 5")


def test_an_interrupted_union_goes_on_behind_its_last_member(moe, dataset, tmp_path, monkeypatch):
    settings = {**QUIET, "level": ["worst_case"], "resume_dir": tmp_path, "check_names": False, "union_restarts": 2}
    ran, run = [], work.worst_case

    def counted(*args, members, **options):
        ran.extend(members)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return run(*args, members=members, **options)

    monkeypatch.setattr(work, "worst_case", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_robustness(moe, dataset, **settings)
    before = ran[:3]
    report = evaluate_robustness(moe, dataset, **settings)
    assert not set(before) & set(ran[4:])  # nothing twice
    union = run(moe, dataset.images / 255, dataset.labels, eps=EPS, steps=2, restarts=2)
    assert report.metrics["ra_adaptive_union"] == pytest.approx(union.accuracy)
    assert "2 APGD steps and 2 restarts per member" in report.threat["attacks"]["worst_case"]
    assert f"{len(union.members)} members" in report.threat["attacks"]["worst_case"]
    assert [name for name in report.cost if "worst case" in name] == ["worst case 2 steps 2 restarts"]


def test_a_bad_image_counts_as_wrong_and_loses_no_other(moe, dataset, monkeypatch):
    expected = correct_mask(moe, dataset)

    class Picky(nn.Module):
        """Gives NaN for two images."""

        def __init__(self):
            super().__init__()
            self.moe, self.bad = moe, (dataset.images[[3, 11]] / 255).mean(dim=(1, 2, 3))

        def forward(self, images):
            bad = (images.mean(dim=(1, 2, 3))[:, None] - self.bad).abs().amin(dim=1) < 1e-6
            return torch.where(bad[:, None], torch.nan, self.moe(images).logits)

    report = evaluate_robustness(Picky().eval(), dataset, **QUIET, batch_size=6)
    expected[[3, 11]] = False
    assert report.metrics["sa"] == pytest.approx(100 * float(expected.float().mean()), abs=1e-4)
    assert report.failures["whole model clean"].startswith("2 images failed and count as wrong (image 3: ValueError: ")
    assert "NaN" in report.failures["whole model clean"]


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1) + 0 * images.sum()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 8}, "eps=8 is larger than .* did you mean 8/255"),
        ({"norm": "l1"}, "norm='l1' is not one of 'linf', 'l2'"),
        ({"steps": 0}, "steps=0 must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"num_images": 24}, "num_images=24, but the dataset has 23 images; allowed is 1 to 23"),
        ({"num_images": 0}, "num_images=0 must be"),
        ({"alphas": (0.5, 1.2)}, r"alphas=\[0.5, 1.2\] must hold"),
        ({"level": "thorough"}, "level='thorough' is not one of 'quick', 'standard', 'full'"),
        ({"level": ["dial", "magic"]}, "level has unknown parts 'magic'; parts are components, dial"),
        ({"min_sa": 0.9, "min_ra": 50}, "min_sa=0.9 and min_ra=50 were both given"),
        ({"min_sa": 101}, r"min_sa=101 must be an accuracy in %, in \[0, 100\]"),
        ({"min_ra": 50, "level": ["components"]}, "min_ra=50 chooses the dial of a dual model"),
        ({"autoattack_version": "slow"}, "autoattack_version='slow' is not one of 'standard'"),
        ({"attack_dtype": "fp16", "level": "full"}, "attack_dtype='fp16' is not one of 'fp32', 'bf16'"),
        ({"attack_dtype": "bf16"}, "attack_dtype='bf16' is for AutoAttack; level='quick' leaves it out"),
        ({"eps": 0, "level": "standard"}, "eps=0 leaves nothing to check"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(model, dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(model, dataset, **{**QUIET, **arguments})


def test_models_that_do_not_fit_are_refused(model, moe, dataset):
    with pytest.raises(ValueError, match="min_sa=50 chooses the dial of a dual model"):
        evaluate_robustness(moe, dataset, **QUIET, min_sa=50)
    with pytest.raises(ValueError, match="logits that are NaN or infinite for 8 of 8 clean images"):
        evaluate_robustness(Constant(0.0, torch.nan, 1.0, 0.5).eval(), dataset, **QUIET)
    with pytest.raises(ValueError, match=r"logits of shape \(8, 2\); expected \(images, 4\)"):
        evaluate_robustness(Constant(0.0, 1.0).eval(), dataset, **QUIET)
    named = copy.deepcopy(moe)
    named.config.id2label = dict(enumerate("acbd"))
    with pytest.raises(ValueError, match="another order than the model's id2label: label 1 is 'b' in the dataset and"):
        evaluate_robustness(named, dataset, **QUIET)
    named.config.id2label = dict(enumerate("abxd"))
    with pytest.raises(ValueError, match="other than the model's id2label: label 2 is 'c' .* 'x' in the model"):
        evaluate_robustness(named, dataset, **QUIET)
    check_class_names(named, dataset.class_names, names_too=False)
    named.config.id2label = dict(enumerate("abcd"))
    check_class_names(named, dataset.class_names)
    with pytest.raises(ValueError, match=r"dataset has 5 classes \(a, b, c, d, ...\) but the model has 4"):
        check_class_names(named, [*"abcde"], names_too=False)


def test_images_of_another_shape_than_the_model_takes_are_refused(moe, dataset):
    """A mixture of CNNs takes any size, and its accuracy on another is a wrong number."""
    channels, size = dataset.images.shape[1], dataset.images.shape[-1]
    larger = ImageTensorDataset(dataset.images.repeat(1, 1, 2, 2), dataset.labels, dataset.class_names)
    shapes = f"images are {channels} x {2 * size} x {2 * size} .* model takes {channels} x {size} x {size}"
    with pytest.raises(ValueError, match=shapes):
        evaluate_robustness(moe, larger, **QUIET)
    other = copy.deepcopy(moe)
    other.config.num_channels = channels + 1
    with pytest.raises(ValueError, match=f"images are {channels} x {size} .* takes {channels + 1} x {size} x {size}"):
        evaluate_robustness(other, dataset, **QUIET)


def test_num_images_takes_a_stratified_choice(moe, dataset):
    report = evaluate_robustness(moe, dataset, **QUIET, num_images=9, seed=4)
    assert report.dataset["num_images"] == 9
    digests = [data_digest(dataset.take(9, seed=4)), data_digest(dataset)]
    assert [report.dataset[name] for name in ("digest", "taken_from")] == digests
    expected = correct_mask(moe, dataset.take(9, seed=4))
    assert report.metrics["sa"] == pytest.approx(100 * float(expected.float().mean()), abs=1e-4)


def test_alpha_is_chosen_on_held_out_images_for_a_floor(model, dataset):
    held_out = dataset.subset(range(4, 23))
    options = {**QUIET, "alphas": (0.0, 0.6, 1.0), "level": ("components", "dial")}
    free = evaluate_robustness(model, dataset, **options)
    assert "the 23 test images themselves (optimistic)" == free.alpha_choice["chosen_on"]
    chosen = evaluate_robustness(model, dataset, **options, held_out=held_out, min_sa=90)
    assert chosen.alpha_choice["alpha"] == 0.0  # the labels are those of F_S
    clean = correct_mask(model.standard, held_out)
    assert chosen.alpha_choice["sa"] == pytest.approx(100 * float(clean.float().mean()), abs=1e-4)
    assert chosen.alpha_choice["chosen_on"] == "19 held-out images"
    dialed, attack = DialedModel(model, 0.0), dial_attack(4, eps=EPS, steps=2)
    attacked = correct_mask(dialed, held_out, attack=attack)
    assert chosen.alpha_choice["ra"] == pytest.approx(100 * float((clean & attacked).float().mean()), abs=1e-4)
    assert "SA of at least 90 %" in chosen.alpha_choice["rule"]
    assert "Recommended alpha = 0" in "\n".join(chosen.notes())
    beyond = evaluate_robustness(model, dataset, **options, min_sa=100)
    assert beyond.alpha_choice == {}
    assert "min_sa=100 cannot be reached" in beyond.failures["recommended alpha"]


def test_doubts_end_in_the_report(dataset, model):
    class Masked(nn.Module):
        """Hides its gradients: quantised images."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, images):
            return self.inner((images * 255).round() / 255).logits

    report = evaluate_robustness(Masked().eval(), dataset, **QUIET)
    assert any(reason.startswith("zero_gradients: ") for reason in report.suspicious)
    assert not report.sanity["zero_gradients"]["passed"]
    assert report.sanity["zero_gradients"]["message"]
    assert "SUSPICIOUS: zero_gradients" in "\n".join(report.notes())


@pytest.mark.parametrize(
    ("arguments", "spent"),
    [({}, (8, 5)), ({"level": ["sanity"]}, (9, 6)), ({"sanity_images": 7}, (7, 5))],
    ids=str,
)
def test_every_level_runs_the_checks_and_quick_spends_less(moe, dataset, monkeypatch, arguments, spent):
    monkeypatch.setattr(evaluation, "SANITY_DEFAULT", {"num_images": 9, "square_queries": 6})
    seen = []

    def spy(*args, **kwargs):
        seen.append((kwargs["num_images"], kwargs["square_queries"]))
        return {"spied": Check(False, "seen", {})}

    monkeypatch.setattr(parts, "run_sanity_checks", spy)
    report = evaluate_robustness(moe, dataset, **QUIET, **arguments)
    assert seen == [spent]
    assert report.sanity == {"spied": {"passed": False, "message": "seen"}} and report.suspicious == ["spied: seen"]
    assert all("sanity" in parts for parts in evaluation.LEVELS.values())


def test_without_a_radius_the_quick_level_has_nothing_to_check(moe, dataset):
    report = evaluate_robustness(moe, dataset, **{**QUIET, "eps": 0})
    assert report.sanity == {} and report.metrics["sa"] == report.metrics["ra_pgd2"]


def test_found_joins_uneven_parts():
    left = Found(
        torch.tensor([0, 2, 4]), {"right": torch.tensor([True, False, True])}, {"n": 2}, {}, torch.zeros(3) > 0
    )
    right = Found(torch.tensor([1, 3]), {}, {"n": 3}, {"error": ["bad"]}, torch.ones(2) > 0)
    whole = Found.joined([left, right])
    assert whole.rows.tolist() == [0, 1, 2, 3, 4]
    assert whole.tensors["right"].tolist() == [True, False, False, False, True]
    assert whole.failed.tolist() == [False, True, False, True, False]
    assert whole.sums == {"n": 5} and whole.texts == {"error": ["bad"]}
    alone = Processes()
    assert alone.share(3).tolist() == [0, 1, 2] and alone.gather("x") == ["x"]


def test_table_shows_every_row(report):
    table = report.table()
    assert "SA %" in table and "RA PGD3 %" in table
    assert "dual model (alpha = 0.6)" in table
    for row in ("standard alone", "robust alone", "dial at alpha = 0.9", "95 % interval"):
        assert row in table
    assert f"{report.metrics['sa']:.2f}" in table
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned
    partial = copy.deepcopy(report)
    del partial.metrics["components"]["robust"]["ra_pgd3"]
    assert partial.table().splitlines()[5].endswith(" -")


def test_a_single_mixture_has_no_dial(moe, dataset, tmp_path):
    report = evaluate_robustness(moe, dataset, **SMALL, level=[p for p in LEVELS["standard"] if p != "sanity"])
    assert report.failures == {}
    assert report.alpha_sweep == [] and "components" not in report.metrics and report.alpha_choice == {}
    assert "expert_load" in report.metrics and "ra_router_pgd2" in report.metrics
    assert "whole model PGD-2" in report.cost
    with pytest.raises(ValueError, match="alpha_sweep"):
        plot_tradeoff(report, tmp_path / "plot.png")
