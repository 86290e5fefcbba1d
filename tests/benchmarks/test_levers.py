"""Training levers of the studies: by hand what each adds, what it costs, and what is refused before training."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.certification.lipschitz import NotApplicableError
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.trainer import RobustTrainer
from training.benchmarks.study import levers, study
from training.benchmarks.study import run as study_run
from training.benchmarks.study import summary as study_tables

BENCHMARKS = Path(__file__).parents[2] / "training" / "benchmarks"


@pytest.fixture
def tiny(tiny_study):
    """tiny(**changes): path of the levers' study, small and changed."""
    return partial(tiny_study, "digits_levers", {"shared_stages": 2, "router": "linear"}, seeds=[0])


@pytest.fixture
def tiny_run(tiny, tmp_path):
    """tiny_run(arms, **changes): a run of the first of these arms."""

    def make(arms, **changes):
        changes = {"reference": next(iter(arms)), "arms": arms, **changes}
        return study_run.StudyRun(study.read_study(tiny(**changes)), next(iter(arms)), 0, tmp_path / "run")

    return make


@pytest.fixture
def trainer_of(tmp_path, images, labels):
    """trainer_of(model, name, options, **settings): the trainer of a lever, with 13 images."""
    data = ImageTensorDataset((255 * images).byte(), labels, [str(i) for i in range(7)])

    def make(model, name=None, options=None, **settings):
        common = {"output_dir": str(tmp_path), "method": "at", "eps": 0.1, "training_attack": "nfgsm", "max_steps": 2}
        common |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        common |= {"learning_rate": 1e-3, "per_device_train_batch_size": 13, "second_term": "ce"}
        args = RobustTrainingArguments(**{**common, **settings})
        kind = levers.lever_trainer(name, options) if name else RobustTrainer
        return kind(model.train(), args, train_dataset=data)

    return make


class Noise:
    """An attack that counts its calls."""

    calls = 0

    def __call__(self, model, images, labels):
        self.calls += 1
        return (images + 0.1 * torch.rand_like(images)).clamp(0, 1)


def test_awp_pays_for_one_more_pass_and_takes_fewer_steps(tiny_run):
    single = {"num_experts": 1, "shared_stages": 0}
    run = tiny_run({"plain": {"settings": single}, "awp": {"settings": {**single, "awp_gamma": 0.01}}}, passes=30)
    cost = {
        arm: run.step_flops(run.settings_of(arm), run.trainer_class(arm)) / run.pass_flops for arm in ("plain", "awp")
    }
    assert cost["awp"] == pytest.approx(cost["plain"] + 1, rel=0.01)
    (plain, passes), (fewer, same) = run.steps("plain"), run.steps("awp")
    assert fewer == pytest.approx(plain * cost["plain"] / cost["awp"], abs=1)
    assert passes == pytest.approx(30, abs=cost["plain"]) and same == pytest.approx(30, abs=cost["awp"])


# --- penalties -------------------------------------------------------------------------------------------------------


def test_z_loss_and_margin_by_hand():
    scores = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    z = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in scores.tolist()]
    assert levers.z_loss(scores).item() == pytest.approx(sum(z) / 2)
    assert levers.margin_hinge(scores, 1.5).item() == pytest.approx(((1.5 - 0.5) + 0) / 2)
    assert levers.margin_hinge(scores, 3.0).item() == pytest.approx(((3 - 0.5) + (3 - 2)) / 2)


def test_route_radius_by_hand(make_moe, trainer_of, images):
    """min over others of score gap / (L1 norm of the difference of the weights / std), hinged at half of eps."""
    model = make_moe(router="linear")
    trainer = trainer_of(model, "route_radius", {"coef": 2.0, "radius": 0.5})
    weight, bias = model.router[-1].weight, model.router[-1].bias
    std = torch.tensor(model.config.image_std).repeat_interleave(30 * 30)
    mean = torch.tensor(model.config.image_mean).repeat_interleave(30 * 30)
    hinges = []
    for image in images.flatten(1):
        scores = weight @ ((image - mean) / std) + bias
        first = int(scores.argmax())
        others = [k for k in range(4) if k != first]
        distance = min((scores[first] - scores[k]) / ((weight[first] - weight[k]) / std).abs().sum() for k in others)
        hinges.append(max(0.0, 0.05 - distance.item()) / 0.05)
    assert 0 < sum(hinges)
    assert trainer.penalty(model, images, None).item() == pytest.approx(sum(hinges) / len(hinges), rel=1e-4)


def test_penalties_join_the_loss_on_rows_that_the_router_decides(make_moe, trainer_of, images, labels):
    attack = Noise()
    for name, options in (("z_loss", {"coef": 0.7}), ("router_margin", {"coef": 0.3, "target": 50.0})):
        losses = {}
        for kind in (None, name):
            trainer = trainer_of(make_moe(), kind, options, method="rt_er")
            torch.manual_seed(6)
            losses[kind] = trainer.objective(trainer.model, images, labels, attack=attack)
        scores = trainer.model.route(losses[name].attacked_images)  # images of the forced second expert do not count
        penalty = levers.z_loss(scores) if name == "z_loss" else levers.margin_hinge(scores, 50.0)
        added = losses[name].loss - losses[None].loss
        assert added.item() == pytest.approx(options["coef"] * penalty.item(), rel=1e-4)
        assert losses[name].terms[name].item() == pytest.approx(penalty.item(), rel=1e-5)
        router = trainer.model.router[-1].weight
        assert torch.autograd.grad(added, router)[0].abs().sum() > 0


# --- training --------------------------------------------------------------------------------------------------------


def two_mixtures(make_moe):
    return DualMoEForImageClassification.from_models(make_moe(), make_moe(router="pooled"), alpha=0.5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("z_loss", "rt_er"),
        ("router_margin", "jtdmoe"),
        ("route_radius", "at"),
    ],
)
def test_every_lever_trains_and_logs_its_term(name, method, make_moe, trainer_of):
    model = two_mixtures(make_moe) if method == "jtdmoe" else make_moe()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer = trainer_of(model, name, method=method, logging_steps=1)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(math.isfinite(entry["loss"]) for entry in logs)
    assert all(math.isfinite(entry[f"loss_{name}"]) for entry in logs)
    moved = [key for key, p in model.named_parameters() if not torch.equal(p, before[key])]
    assert any("router" in key for key in moved) and any("experts" in key for key in moved)


# --- refused before training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "named"),
    [
        ({"lever": "zloss"}, "lever='zloss' is not one of z_loss, router_margin"),
        ({"lever": "z_loss", "lever_args": {"coeff": 1}}, "coeff is unknown; it takes coef"),
        ({"lever": "z_loss", "lever_args": {"coef": 0}}, "coef=0 must be a finite number > 0"),
        ({"lever": "z_loss", "lever_args": {"coef": "1e-3"}}, "coef='1e-3' must be"),
        ({"lever_args": {"coef": 1}}, "lever_args needs a lever"),
        ({"passes": 0}, "passes=0 must be > 0"),
        ({"passes": 1, "same_steps_as": "single"}, "does not go with passes"),
        ({"init_from": "nothing"}, "init_from='nothing' is not an arm"),
        ({"init_from": "moe", "settings": {"shared_stages": 1}}, "init_from='moe' must be one network .* same shape"),
        ({"init_from": "moe", "settings": {"router_top_k": 4}}, "init_from='moe' costs 1 of 1 passes"),
        ({"init_from": "single"}, "init_from='single' costs 1 of 1 passes"),
        ({"init_from": "mine", "passes": 3}, "mine -> mine is a circle"),
        ({"same_steps_as": "partner"}, "partner -> mine -> partner is a circle"),
        ({"standard": "single", "robust": "single", "lever": "z_loss"}, "lever have no meaning"),
    ],
)
def test_wrong_arms_are_refused_when_the_study_is_read(arm, named, tiny):
    arms = {"single": {"settings": {"num_experts": 1}}, "moe": {}, "partner": {"same_steps_as": "mine"}, "mine": arm}
    if arm.get("same_steps_as") != "partner":
        del arms["partner"]
    with pytest.raises(ValueError, match=named):
        study.read_study(tiny(arms=arms, reference="single"))


def test_the_reference_must_be_an_arm(tiny):
    with pytest.raises(ValueError, match="reference='none' is not an arm"):
        study.read_study(tiny(reference="none"))


def test_a_lever_that_does_not_fit_the_model_is_refused(make_moe, trainer_of):
    with pytest.raises(ValueError, match="'z_loss' needs a router: num_experts=1"):
        trainer_of(make_moe(num_experts=1), "z_loss")
    with pytest.raises(NotApplicableError, match="router='conv' is not affine"):
        trainer_of(make_moe(router="conv"), "route_radius")


def test_the_script_refuses_a_wrong_lever(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["levers.py", "zloss", "{}"])
    with pytest.raises(SystemExit, match="lever='zloss' is not one of"):
        levers.main()


# --- budgets, order, tables ------------------------------------------------------------------------------------------

UPCYCLED = {
    "up": {"init_from": "half", "passes": 24},
    "longer": {"init_from": "half", "settings": {"awp_gamma": 0.01}},
    "half": {"settings": {"num_experts": 1, "shared_stages": 0}, "passes": 12},
    "scratch": {"passes": 24},
}


def test_an_upcycled_arm_pays_for_the_model_that_it_starts_from(tiny_run):
    run = tiny_run(UPCYCLED, passes=40)
    totals = {arm: run.steps(arm) for arm in UPCYCLED}
    for arm, passes in {"up": 24, "longer": 40, "half": 12, "scratch": 24}.items():
        own = totals[arm][1] - run.passes_before(arm)
        assert totals[arm][1] == pytest.approx(passes, abs=0.51 * own / totals[arm][0]), arm
    assert run.passes_before("up") == totals["half"][1] and run.passes_before("scratch") == 0
    assert totals["up"][0] == pytest.approx(totals["scratch"][0] / 2, abs=1)


@pytest.mark.parametrize(
    ("standard", "robust", "passes"), [("up", "half", 24), ("up", "longer", 52), ("scratch", "half", 36)]
)
def test_a_joined_arm_pays_once_for_the_model_that_both_started_from(standard, robust, passes, tiny_run):
    run = tiny_run({"pair": {"standard": standard, "robust": robust}, **UPCYCLED}, passes=40)
    trained = {"up": (24, 12), "longer": (40, 12), "half": (12, None), "scratch": (24, None)}
    for arm, (total, before) in trained.items():
        training = {"passes": total} | ({"passes_from": before} if before else {})
        folder = run.model_of(arm).parent
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"training": training}))
    assert run.joined_passes() == passes


def test_models_that_others_need_come_first(tiny):
    joined = {"standard": "up", "robust": "half"}
    content = study.read_study(tiny(arms={"pair": joined, **UPCYCLED}, reference="half", passes=40))
    order = [run.arm for run in study.plan(content, list(content["arms"]), [0])]
    assert order.index("half") < order.index("up") < order.index("pair")
    with pytest.raises(ValueError, match="'up' needs the models of half: ask for them too"):
        study.plan(content, ["up"], [0])


def test_tables_show_the_differences_to_the_reference(tiny):
    def result(arm, seed, sa, ra, **more):
        cost = {
            "parameters": 2000,
            "flops": 100,
            "training": {"passes": 3.0, "steps": 9},
            "expert_load": [30.0, 70.0 - seed],
        }
        return {"arm": arm, "seed": seed, "sa": sa, "ra": ra, "ra_pgd": ra, **cost, **more}

    robust = {"robust": {"sa": 61.0, "ra": 34.0}, "alpha": 1, "sweep": []}
    results = [result("base", 0, 50, 20), result("base", 1, 60, 30), result("awp", 1, 58, 33)]
    results += [result("single", 2, 1, 1), result("jtdmoe", 1, 62, 31, **robust)]
    summary = study_tables.summarise(results, study.read_study(tiny(passes=60)))
    assert summary["awp"]["against"]["sa"]["mean"] == -2  # against the same seed, not the mean of all
    assert summary["awp"]["against"]["ra"] == {"mean": 3, "min": 3, "max": 3}
    assert "against" not in summary["single"]  # no seed in common
    rows = {row[0]: row for row in study_tables.table_rows(summary)}
    assert rows["awp"][-4:] == ["30", "-", "-2.0", "+3.0"] and rows["single"][-2:] == ["-", "-"]
    assert rows["jtdmoe"][-2:] == ["+2.0", "+1.0"] and rows["F_R of jtdmoe"][-2:] == ["+1.0", "+4.0"]
    assert {len(row) for row in rows.values()} == {len(study_tables.header(summary))}
    assert "| SA +- | RA +- |" in study_tables.render_arms(summary)
    for entry in summary.values():
        entry.pop("against", None)
    assert len(study_tables.header(summary)) == len(study_tables.HEADER)


def test_the_levers_study_compares_like_with_like(tmp_path):
    """Widths keep the cost of an answer, and upcycled experts fit the network that they start from."""
    content = study.read_study(BENCHMARKS / "study" / "studies" / "digits_levers.yaml")
    run = study_run.StudyRun(content, "base", 0, tmp_path)
    models = {
        arm: run.build(run.settings_of(arm)) for arm in ("single", "single_half", "base", "dense_full", "upcycled")
    }
    models |= {arm: run.build(run.settings_of(arm)) for arm in ("top_2", "shared_1", "shared_2", "upcycled_hard")}
    image = run.data.test.images[:1].float() / 255
    cost = {arm: study_run.forward_flops(model, image) for arm, model in models.items()}
    assert [a for a in cost if abs(cost[a] / cost["single"] - 1) > 0.05] == ["dense_full"]
    for arm in ("upcycled", "upcycled_hard"):
        assert content["arms"][arm]["init_from"] == "single_half"
        models[arm].load_backbone(models["single_half"].backbone_state_dict())


@pytest.mark.slow
def test_a_whole_study_of_levers(tiny, tmp_path):
    shared = {"method": "rt_er", "router_top_k": 4, "logging_steps": 1}
    arms = {
        "up": {"settings": shared, "init_from": "half", "passes": 40},
        "half": {"settings": {"num_experts": 1, "shared_stages": 0}, "passes": 20},
        **{name: {"settings": shared, "lever": name} for name in levers.LEVERS},
    }
    path, folder = tiny(arms=arms, passes=4, reference="z_loss"), tmp_path / "out"
    assert study.main(["--study", str(path), "--output_dir", str(folder), "--threads", "1"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert set(results["arms"]) == set(arms) and "SA +-" in (folder / "table.txt").read_text()
    trained = {run["arm"]: run["training"] for run in results["runs"]}
    assert trained["up"]["passes_from"] == trained["half"]["passes"] == pytest.approx(20, abs=1)
    assert trained["up"]["passes"] == pytest.approx(40, abs=3) and trained["z_loss"]["lever"] == "z_loss"
    logs = {arm: (folder / "runs" / f"{arm}-seed0" / "log.txt").read_text() for arm in arms}
    assert "loss_z_loss" in logs["z_loss"] and "loss_z_loss" not in logs["router_margin"]
    up = json.loads((folder / "runs" / "up-seed0" / "settings.json").read_text())
    assert up["model"]["init_experts_from"].endswith("half-seed0/model")
