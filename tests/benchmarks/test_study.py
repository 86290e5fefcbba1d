"""The study harness: plans, budgets, tables, and a whole tiny study in processes of its own."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModelForImageClassification

from training.benchmarks import results_page
from training.benchmarks.shared.store import read_json, write_json
from training.benchmarks.study import definition, study
from training.benchmarks.study import run as study_run
from training.benchmarks.study import summary as study_tables

BENCHMARKS = Path(__file__).parents[2] / "training" / "benchmarks"


@pytest.fixture
def tiny(tiny_study):
    """tiny(**changes): path of the digits study, small and changed."""
    return partial(tiny_study, "digits")


PAIR = {"standard": "a", "robust": "a"}


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "study" / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_reads_and_plans(path):
    content = study.read_study(path)
    study.plan(content, definition.usual_arms(content), content["seeds"])  # they need no extra arm
    runs = study.plan(content, list(content["arms"]), content["seeds"])
    assert len({run.name for run in runs}) == len(runs) == len(content["arms"]) * len(content["seeds"])
    places = {run.name: i for i, run in enumerate(runs)}
    assert all(places[part] < places[run.name] for run in runs for part in run.parts)


@pytest.mark.parametrize(
    ("mine", "named"),
    [
        ({"setings": {}}, "setings"),
        ({"extra": "yes"}, "extra='yes' must be true or false"),
        ({"passes": 0}, "passes=0 must be > 0"),
        ({"init_from": "nothing"}, "init_from='nothing' is not an arm"),
        ({"init_from": "moe", "settings": {"shared_stages": 1}}, "init_from='moe' must be one network .* same shape"),
        ({"init_from": "moe", "settings": {"router_top_k": 4}}, "init_from='moe' costs 1 of 1 passes"),
        ({"init_from": "a"}, "init_from='a' costs 1 of 1 passes"),
        ({"init_from": "mine", "passes": 3}, "mine -> mine is a circle"),
        ({"standard": "a"}, "standard and robust go together"),
        ({"mixing": "weights"}, "mixing given: only an arm that joins models"),
        ({**PAIR, "mixing": "sum"}, "mixing='sum' is not one of 'probs', 'logits', 'wei"),
        ({**PAIR, "calibrate": 1}, "calibrate=1 must be true or false"),
        ({**PAIR, "calibrate": True, "mixing": "weights"}, "calibrate goes with mixing='pr"),
        ({**PAIR, "robust": "moe", "mixing": "weights"}, "two models of one shape; they differ in num_experts"),
        ({**PAIR, "settings": {}}, "it joins trained models, so that settings have no"),
    ],
)
def test_a_wrong_arm_is_refused_by_name(tiny, mine, named):
    with pytest.raises(ValueError, match=named):
        study.read_study(tiny(arms={"a": {"settings": {"num_experts": 1}}, "moe": {}, "mine": mine}))


def test_a_study_with_an_unknown_key_is_refused(tiny):
    with pytest.raises(ValueError, match="budget"):
        study.read_study(tiny(budget=3))


def test_an_arm_may_have_positions_of_the_dial_of_its_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(study_run, "sweep_alpha", lambda *_, alphas, **__: [{"alpha": alpha} for alpha in alphas])
    content = study.read_study(tiny(arms={"a": {}, "b": {"evaluation": {"alphas": [0.9, 1]}}}))
    for arm, alphas in (("a", content["evaluation"]["alphas"]), ("b", [0.9, 1])):
        sweep, _ = study_run.StudyRun(content, arm, 0, tmp_path / arm).sweep(None)
        assert [point["alpha"] for point in sweep] == alphas


@pytest.mark.parametrize(
    ("more", "mixing", "mapped"),
    [({}, "probs", False), ({"mixing": "weights"}, "weights", False), ({"calibrate": True}, "probs", True)],
    ids=["probs", "weights", "calibrated"],
)
def test_an_arm_joins_two_trained_models_as_it_says(tiny, tmp_path, monkeypatch, more, mixing, mapped):
    content = study.read_study(
        tiny(arms={"a": {"settings": {"num_experts": 1, "shared_stages": 0}}, "p": PAIR | more})
    )
    found = {"robust_logit_map": {"scale": 3.0}, "alpha": 0.9}
    monkeypatch.setattr(study_run, "calibrate_robust_logits", lambda model, images, **options: found)
    run = study_run.StudyRun(content, "p", 0, tmp_path / "p-seed0")
    run.build(definition.settings_of(content, "a")).save_pretrained(run.model_of("a"))
    (run.model_of("a").parent / "run.json").write_text(json.dumps({"training": {"passes": 2.0}}))
    training = run.train()
    model = AutoModelForImageClassification.from_pretrained(run.folder / "model")
    assert training["mixing"] == model.config.mixing == mixing and training["passes"] == 2.0
    assert model.config.robust_logit_map == ({"scale": 3.0} if mapped else None)
    assert training.get("calibration") == (found if mapped else None)


UPCYCLED = {
    "up": {"init_from": "half", "passes": 24},
    "longer": {"init_from": "half", "settings": {"awp_gamma": 0.01}},
    "half": {"settings": {"num_experts": 1, "shared_stages": 0}, "passes": 12},
    "scratch": {"passes": 24},
}


@pytest.fixture
def upcycled(tiny, tmp_path):
    """upcycled(standard, robust): the run of a pair of two arms of UPCYCLED."""

    def make(standard, robust):
        arms = {"pair": {"standard": standard, "robust": robust}, **UPCYCLED}
        return study_run.StudyRun(study.read_study(tiny(arms=arms, passes=40)), "pair", 0, tmp_path / "run")

    return make


def test_an_upcycled_arm_pays_for_the_model_that_it_starts_from(upcycled):
    run = upcycled("up", "half")
    totals = {arm: run.steps(arm) for arm in UPCYCLED}
    for arm, passes in {"up": 24, "longer": 40, "half": 12, "scratch": 24}.items():
        own = totals[arm][1] - run.passes_before(arm)
        assert totals[arm][1] == pytest.approx(passes, abs=0.51 * own / totals[arm][0]), arm
    assert run.passes_before("up") == totals["half"][1] and run.passes_before("scratch") == 0
    assert totals["up"][0] == pytest.approx(totals["scratch"][0] / 2, abs=1)
    order = [each.arm for each in study.plan(run.study, list(run.study["arms"]), [0])]
    assert order.index("half") < order.index("up") < order.index("pair")


@pytest.mark.parametrize(
    ("standard", "robust", "passes"), [("up", "half", 24), ("up", "longer", 52), ("scratch", "half", 36)]
)
def test_a_joined_arm_pays_once_for_the_model_that_both_started_from(standard, robust, passes, upcycled):
    run = upcycled(standard, robust)
    trained = {"up": (24, 12), "longer": (40, 12), "half": (12, None), "scratch": (24, None)}
    for arm, (total, before) in trained.items():
        training = {"passes": total} | ({"passes_from": before} if before else {})
        write_json(run.model_of(arm).parent / "run.json", {"training": training})
    assert run.joined_passes() == passes


def test_plan_refuses_arms_that_cannot_be_run(tiny):
    content = study.read_study(tiny())
    with pytest.raises(ValueError, match="'nothing' is not one of"):
        study.plan(content, ["nothing"], [0])
    with pytest.raises(ValueError, match="rt_er: ask for them too"):
        study.plan(content, ["standard", "separate_dual"], [0])


def test_the_budget_is_spent_whatever_a_step_costs(tiny, tmp_path):
    """The stated passes per image, up to half a step, for cheap and dear methods; dearer ones take fewer steps."""
    plain = {"num_experts": 1, "shared_stages": 0}
    settings = {
        "standard": {"method": "standard", **plain},
        "nfgsm": plain,
        "pgd": {"training_attack": "pgd", "attack_steps": 5, **plain},
        "rt_er": {"method": "rt_er"},
        "dense": {"router_top_k": 4},
    }
    arms = {name: {"settings": own} for name, own in settings.items()}
    run = study_run.StudyRun(study.read_study(tiny(arms=arms, passes=30)), "nfgsm", 0, tmp_path / "run")
    spent = {name: run.steps(name) for name in arms}
    assert all(passes == pytest.approx(30, abs=0.6 * 30 / steps) for steps, passes in spent.values())
    steps = {name: count for name, (count, _) in spent.items()}
    assert steps["standard"] == 30  # one pass per image, one batch per epoch
    # forward : input gradient : weight gradient = 1 : 1 : 1, so that an attack pass costs 2/3 of a training pass
    assert steps["nfgsm"] == pytest.approx(30 / (1 + 2 / 3), rel=0.03)
    assert steps["pgd"] == pytest.approx(30 / (1 + 5 * 2 / 3), rel=0.05)
    assert steps["rt_er"] < steps["nfgsm"] and steps["dense"] < steps["nfgsm"]


def test_summary_has_mean_and_range_and_the_gain_of_the_dial(tiny):
    def result(arm, seed, sa, ra, **more):
        cost = {"parameters": 2000, "flops": 100 if arm == "single" else 250, "training": {"passes": 3.0, "steps": 9}}
        return {"arm": arm, "seed": seed, "sa": sa, "ra": ra, "ra_pgd": ra + 1, **cost, **more}

    def dual(seed, sa, ra):
        sweep = [{"alpha": alpha, "sa": sa, "ra": ra} for alpha in ((0.5, 1) if seed else (0, 0.5))]
        return result("jtdmoe", seed, sa, ra, robust={"sa": 40.0, "ra": 30.0}, alpha=0.5, sweep=sweep)

    results = [result("single", 0, 50, 20), result("single", 1, 60, 30), dual(0, 44, 29), dual(1, 46, 28)]
    summary = study_tables.summarise(results, study.read_study(tiny()))
    assert summary["single"]["sa"] == {"mean": 55, "min": 50, "max": 60}
    assert summary["jtdmoe"]["relative_flops"] == 2.5
    assert summary["jtdmoe"]["gain_sa"] == {"mean": 5, "min": 4, "max": 6}
    assert summary["jtdmoe"]["loss_ra"] == {"mean": 1.5, "min": 1, "max": 2}
    assert summary["jtdmoe"]["sweep"] == [{"alpha": 0.5, "sa": 45, "ra": 28.5}]
    table = study_tables.render_arms(summary)
    assert "55.0 (50.0 to 60.0)" in table and "F_R of jtdmoe" in table


def test_a_definition_is_all_that_a_result_depends_on(tiny):
    content = study.read_study(tiny())
    before = {arm: definition.definition(content, arm) for arm in content["arms"]}

    def changed(**more) -> set[str]:
        return {arm for arm in content["arms"] if definition.definition({**content, **more}, arm) != before[arm]}

    arms = content["arms"]
    told = {**arms["single"], "about": "other words", "extra": True}
    assert changed(seeds=[7], arms={**arms, "new": {}, "single": told}) == set()
    assert changed(passes=7) == set(arms)
    other = {**arms, "rt_er": {"settings": {"method": "rt_er"}}}
    assert changed(arms=other) == {"rt_er", "separate_clean", "separate_dual"}
    assert definition.definition(content, "nothing") is None


def test_a_run_that_cannot_be_started_is_noted(tiny, tmp_path, monkeypatch):
    """A full disk, for example; a run that needs its model then gives up, too, in place of waiting forever."""
    content = study.read_study(tiny())
    runs = study.plan(content, ["standard", "rt_er", "separate_clean"], [0])
    work = study.Study(content, runs, tmp_path, jobs=2, threads=1)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(study.subprocess, "run", full)
    work.work()
    assert set(work.failed) == {run.name for run in runs}
    assert work.failed["separate_clean-seed0"] == "a model that it needs is missing"


def test_bf16_reaches_the_training_and_the_record(tiny, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(study_run.subprocess, "run", lambda command, **_: commands.append(command))
    for bf16 in ({}, {"bf16": True}):
        content = {**study.read_study(tiny(arms={"single": {}})), **bf16}
        run = study_run.StudyRun(content, "single", 0, tmp_path / f"{len(commands)}")
        known = run.train()
        recipe = yaml.safe_load(Path(commands[-1][commands[-1].index("--recipe") + 1]).read_text())
        assert recipe.get("bf16", False) == known.get("bf16", False) == bool(bf16)


def test_a_folder_goes_on_in_the_precision_that_it_was_begun_in(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(study.Study, "attempt", lambda self, run: self.folder(run.name).mkdir(parents=True))
    command = ["--study", str(tiny(arms={"single": {}})), "--seeds", "0", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(study.Study, "write", lambda self: (tmp_path / "out" / "table.txt").write_text(""))
    assert study.main([*command, "--bf16"]) == 0 and study.main(command) == 2
    assert "runs of single with other settings" in capfd.readouterr().err


def test_numbers_of_a_broken_measurement_are_refused():
    metrics = {"sa": 90.0, "ra_pgd10": 50.0, "ra_worst_case": 40.0}
    described = {
        "metrics": metrics,
        "dataset": {"num_images": 9},
        "environment": {},
        "threat": {"attacks": {"worst_case": "union"}},
    }
    report = SimpleNamespace(failures={}, **described)
    assert (study_run.numbers(report)["ra"], study_run.numbers(report)["union"]) == (40.0, "union")
    report.failures["worst_case"] = "out of memory"
    with pytest.raises(RuntimeError, match="worst_case: out of memory"):
        study_run.numbers(report)


def test_kept_results_name_the_dataset_and_no_place(tiny, tmp_path, monkeypatch):
    """What --render keeps is what the output folder has, but for places on this machine."""
    rendered, folder = [], tmp_path / "out"
    monkeypatch.setattr(results_page, "render_page", lambda: rendered.append(True))
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    path = tiny(arms={"single": {}})
    content = study.read_study(path)
    run = {"arm": "single", "seed": 0, "sa": 50.0, "ra": 30.0, "ra_pgd": 31.0, "parameters": 9, "flops": 9}
    run["training"] = {"steps": 1, "passes": 1.0}
    failed = {"rt_er-seed0": f"exit status 1; see {folder / 'log.txt'}"}
    made = {"study": {**content, "dataset_name": str(tmp_path)}, "arms": {}, "runs": [run], "failed": failed}
    write_json(folder / "results.json", made)
    assert study.main(["--study", str(path), "--output_dir", str(folder), "--render"]) == 0 and rendered
    kept = read_json(tmp_path / "results" / "study_tiny.json")
    assert kept["study"] == content and kept["runs"] == [run] and kept["arms"]["single"]["sa"]["mean"] == 50
    assert str(tmp_path) not in json.dumps(kept)

    write_json(folder / "results.json", {**made, "study": {**made["study"], "bf16": True}})
    assert study.main(["--study", str(path), "--output_dir", str(folder), "--render"]) == 0
    assert read_json(tmp_path / "results" / "study_tiny.json") == kept  # each run says it, since seeds may differ

    another = {**run, "seed": 1}  # made elsewhere: joins what is kept, as long as the arm is the same
    write_json(folder / "results.json", {**made, "runs": [another], "failed": {}})
    assert study.main(["--study", str(path), "--output_dir", str(folder), "--render"]) == 0
    assert read_json(tmp_path / "results" / "study_tiny.json")["runs"] == [run, another]
    content["arms"]["single"] = {"settings": {"eps": 0.2}}
    write_json(folder / "results.json", {**made, "study": content, "runs": [another], "failed": {}})
    assert study.main(["--study", str(path), "--output_dir", str(folder), "--render"]) == 0
    assert read_json(tmp_path / "results" / "study_tiny.json")["runs"] == [another]


@pytest.mark.slow
def test_a_whole_study_runs_resumes_and_survives_a_failed_run(tiny, tmp_path, capfd):
    arms = yaml.safe_load(tiny().read_text())["arms"]
    kept = {name: arms[name] for name in ("standard", "rt_er", "separate_clean", "jtdmoe")}
    kept["warm"] = {"settings": arms["jtdmoe"]["settings"], "init_from": "rt_er", "passes": 3}
    kept["broken"] = {"settings": {"backbone": "no_such_network"}}
    path, folder = tiny(arms=kept), tmp_path / "out"
    command = ["--study", str(path), "--seeds", "0", "--output_dir", str(folder), "--threads", "1", "--jobs", "2"]
    assert study.main(command) == 1
    assert "FAILED: broken-seed0" in capfd.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert set(results["arms"]) == set(kept) - {"broken"}
    assert 0 < results["arms"]["rt_er"]["passes"] < results["arms"]["separate_clean"]["passes"]
    run = next(run for run in results["runs"] if run["arm"] == "separate_clean")
    assert run["alpha"] in (0, 0.6, 1) and run["ra"] <= run["ra_pgd"] and len(run["sweep"]) == 3
    assert "F_R of separate_clean" in (folder / "table.txt").read_text()

    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/run.json")}
    assert study.main(command) == 1  # the broken one is tried again, the others are kept
    assert {p: p.stat().st_mtime_ns for p in folder.glob("runs/*/run.json")} == stamps
    runs = folder / "runs"

    again = runs / "jtdmoe-seed0"  # judged anew, the dial is not swept anew
    before, swept = json.loads((again / "run.json").read_text()), (again / "sweep.json").stat().st_mtime_ns
    (again / "run.json").unlink()
    assert study.main(command) == 1 and (again / "sweep.json").stat().st_mtime_ns == swept
    after = json.loads((again / "run.json").read_text())
    assert (after["sweep"], after["alpha"], after["ra"]) == (before["sweep"], before["alpha"], before["ra"])

    tiny(arms=kept, passes=2)
    assert study.main(command) == 2
    assert (
        "runs of broken, jtdmoe, rt_er, separate_clean, standard, warm with other settings" in capfd.readouterr().err
    )
