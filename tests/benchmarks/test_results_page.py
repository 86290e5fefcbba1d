"""The pages show what the kept results say; their tables are computed, never typed."""

import json
import shutil

import pytest
import yaml

from training.benchmarks import results_page
from training.benchmarks.reliability import smoke_recipes
from training.benchmarks.shared.render import marks, section
from training.benchmarks.shared.store import BENCHMARKS, CHECKOUT, RESULTS, TRAINING, read_json
from training.benchmarks.study import findings
from training.benchmarks.study.definition import STUDIES
from training.benchmarks.study.findings import Comparison

README, FRONT = (BENCHMARKS / "README.md").read_text(), (CHECKOUT / "README.md").read_text()


# --- what is committed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", results_page.SECTIONS)
def test_the_page_shows_the_kept_results(name):
    assert section(name, results_page.SECTIONS[name]()) in README


def test_every_kept_result_is_shown():
    told = {*results_page.SECTIONS, "survival", "fuzz", "environments", "speed_gpu_before"}  # the latter inside others
    assert {path.stem for path in RESULTS.glob("*.json")} <= told


def test_the_front_page_has_ten_rows_and_no_other_table_of_ours():
    rows = results_page.render_summary().splitlines()
    assert len(rows) <= 2 + results_page.ROWS and {row.count("|") for row in rows} == {9}
    assert section("results", results_page.render_summary()) in FRONT
    assert not [name for name in results_page.SECTIONS if marks(name)[0] in FRONT]


def test_recipes_have_the_time_that_was_measured():
    for recipe in smoke_recipes.FULL_SCALE:
        line = f"# Time: {results_page.gpu_table.step_time(recipe)}\n"
        assert (TRAINING / "recipes" / f"{recipe}.yaml").read_text().count(line) == 1


def test_kept_studies_have_the_summary_of_their_runs():
    for path in RESULTS.glob("study_*.json"):
        results = read_json(path)
        assert results["arms"] == results_page.summarise(results["runs"], results["study"]), path.name


def test_public_numbers_name_their_source():
    rows = read_json(RESULTS / "public_numbers.json")["rows"]
    assert all(row["source"] for row in rows)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """READMEs and recipes to write into, and the results to read."""
    readme, front = tmp_path / "README.md", tmp_path / "FRONT.md"
    readme.write_text("\n".join("\n".join(marks(name)) for name in results_page.SECTIONS))
    front.write_text("\n".join(marks("results")))
    shutil.copytree(TRAINING / "recipes", tmp_path / "recipes")
    shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.setattr(results_page, "TRAINING", tmp_path)
    monkeypatch.setattr(results_page, "RESULTS", tmp_path / "results")
    return readme, front


def test_the_page_is_written_into_its_places(elsewhere, tmp_path):
    readme, front = elsewhere
    (tmp_path / "results" / "dials.png").unlink()
    results_page.render_page(readme, front)
    assert all(section(name, render()) in readme.read_text() for name, render in results_page.SECTIONS.items())
    assert front.read_text() == section("results", results_page.render_summary())
    assert (tmp_path / "results" / "dials.png").stat().st_size > 10_000
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no section"):
        results_page.render_page(readme, front)


def test_a_study_that_was_not_run_is_said_to_be_missing(elsewhere, tmp_path):
    (tmp_path / "results" / "study_cifar10_full.json").unlink()
    assert results_page.SECTIONS["study_cifar10_full"]() == "Not measured yet."
    assert len(results_page.render_summary().splitlines()) < 2 + results_page.ROWS


def test_a_time_line_is_put_after_the_comments_and_replaced():
    once = results_page.with_time("# one\n# two\nmethod: at\n", "3 h")
    assert once == "# one\n# two\n# Time: 3 h\nmethod: at\n"
    assert results_page.with_time(once, "4 h") == "# one\n# two\n# Time: 4 h\nmethod: at\n"
    assert yaml.safe_load(once) == {"method": "at"}


# --- ten rows --------------------------------------------------------------------------------------------------------


def test_a_row_names_model_threat_and_attack(tmp_path, monkeypatch):
    metrics = {"sa": 80.04, "ra_pgd20": 52.0, "ra_adaptive_union": 47.0, "ra_worst_case": 46.0, "ra_autoattack": 48.26}
    report = {
        "model": {"parameters": 2_500_000, "alpha": 0.7, "mixing": "probs"},
        "dataset": {"name": "pets"},
        "threat": {"eps": 4 / 255},
        "metrics": metrics,
        "controls": {"one network": {"sa": 79.0, "ra_pgd20": 50.0}},
    }
    folder = tmp_path / "model_cards" / "pets_dual"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(report))
    monkeypatch.setattr(results_page, "CHECKOUT", tmp_path)
    dual, control = results_page.card_rows(folder)
    link = "[card](model_cards/pets_dual/README.md)"
    robust = "47.0 (adaptive union), 48.3 (AutoAttack)"
    assert dual == ["pets_dual, alpha 0.7", "pets", "4/255", "2.50 M", "2", "80.0", robust, link]
    assert control == ["pets_dual: one network", "pets", "4/255", "-", "-", "79.0", "50.0 (PGD-20)", link]
    report["model"] = {"parameters": 1000, "alpha": 0.7, "mixing": "weights"}
    (folder / "results.json").write_text(json.dumps(report))
    assert results_page.card_rows(folder)[0][4] == "1" and results_page.radius(0.15) == "0.15"


def test_rows_of_the_study_are_means_over_the_same_seeds(monkeypatch):
    """One arm with a seed more would be judged on other images."""
    tiny = {"parameters": 700_000, "flops": 1, "ra_pgd": 1.0, "training": {"steps": 1, "passes": 1.0}}
    found = {("single", 0): (60.0, 30.0), ("single", 1): (70.0, 40.0), ("single_long", 0): (62.0, 31.0)}
    runs = [{"arm": arm, "seed": seed, "sa": sa, "ra": ra, **tiny} for (arm, seed), (sa, ra) in found.items()]
    study = {"settings": {"eps": "8/255"}, "arms": {"single": {}, "single_long": {}}, "passes": 1}
    monkeypatch.setattr(results_page, "kept", lambda name: {"study": study, "runs": runs})
    rows = {row[0]: row[5:] for row in results_page.study_rows()}
    assert rows["one network"][:2] == ["60.0", "30.0 (adaptive union)"] and rows["one network"][2].endswith("1 seed")
    runs.append({**runs[2], "seed": 1, "sa": 72.0})
    rows = {row[0]: row[5:] for row in results_page.study_rows()}
    assert [row[0] for row in rows.values()] == ["65.0", "67.0"] and rows["one network"][2].endswith("2 seeds")
    study["arms"]["rt_er"] = {}
    runs += [{**runs[0], "seed": 7}, {**runs[0], "seed": 7, "arm": "rt_er"}]  # as many arms, fewer seeds
    assert {row[0]: row[5:] for row in results_page.study_rows()} == rows


# --- differences -----------------------------------------------------------------------------------------------------


def kept(**arms: list[tuple[float, float]]) -> dict:
    """Results of a study: arm -> (SA, RA) by seed."""
    runs = [
        {"arm": arm, "seed": seed, "sa": sa, "ra": ra}
        for arm, pairs in arms.items()
        for seed, (sa, ra) in enumerate(pairs)
    ]
    return {"runs": runs, "arms": dict.fromkeys(arms, {})}


def test_differences_pair_the_seeds_that_both_arms_have():
    results, against = kept(a=[(50, 30), (52, 31), (60, 40)], b=[(49, 31), (50, 33)]), Comparison("A", "a", "b")
    assert findings.differences(results, against) == [(1, -1), (2, -2)]
    row = findings.comparison_row(results, against)
    assert row == ["A", "+1.5 (+1.0 to +2.0)", "-1.5 (-2.0 to -1.0)", "-", "-"]
    results["runs"][0]["ra"] = 34
    assert findings.comparison_row(results, against)[2] == "+0.5 (-2.0 to +3.0), no clear difference"
    assert findings.comparison_row(kept(a=[(1, 1)], b=[(2, 3)]), against)[1:3] == [
        "-1.0 (one seed)",
        "-2.0 (one seed)",
    ]
    assert findings.comparison_row(results, Comparison("A", "a", "never_run")) is None


def test_aims_say_no_where_the_mean_misses_them_and_how_many_seeds_reach_them():
    results = kept(rt_er=[(50, 30), (53, 31)], single=[(51, 29), (52, 31)])
    for seed, (sa, ra) in enumerate([(55, 28), (52, 29)]):
        dual = {"arm": "jtdmoe", "seed": seed, "sa": sa, "ra": ra, "robust": {"sa": 50, "ra": 30}}
        results["runs"].append(dual)
    mixture, dial = Comparison("M", "rt_er", "single", (0.0, 0.0)), Comparison("D", "jtdmoe", None, findings.GAIN)
    assert findings.comparison_row(results, mixture)[3:] == ["SA +0, RA +0", "yes (1 of 2 seeds)"]
    found = findings.comparison_row(results, dial)
    assert found[1:3] == ["+3.5 (+2.0 to +5.0)", "-1.5 (-2.0 to -1.0)"]
    assert found[3:] == ["SA +3, RA -1.5", "in the mean only (0 of 2 seeds)"]
    results["runs"][0]["ra"] = 28
    assert findings.comparison_row(results, mixture)[4] == "**no** (1 of 2 seeds)"


def test_unequal_budgets_and_marks_are_told():
    results = kept(a=[(1, 1)], b=[(2, 3)])
    results["arms"] = {"a": {"passes": 80.0, "mark": "†"}, "b": {"passes": 40.0}}
    row = findings.comparison_row(results, Comparison("A", "a", "b"))
    assert row[0] == "A (80 against 40 passes)" and row[2] == "-2.0 (one seed)†"


def test_every_comparison_names_arms_of_a_study():
    studies = {path.stem: set(yaml.safe_load(path.read_text())["arms"]) for path in STUDIES.glob("*.yaml")}
    pairs = [{c.arm, c.other or c.arm} for c in findings.COMPARISONS] + [set(curve[:2]) for curve in findings.CURVES]
    for arms in [*pairs, *({arm} for arm in results_page.DIALS)]:
        assert any(arms <= known for known in studies.values()), arms
    assert set(results_page.ARMS) <= studies[results_page.STUDY]


# --- dials -----------------------------------------------------------------------------------------------------------


def dials(**arms: list[list[tuple[float, float]]]) -> dict:
    """Results of a study with sweeps at alpha 0 and 1: arm -> points (SA, RA) by seed."""
    runs = [
        {
            "arm": arm,
            "seed": seed,
            "swept_with": ["whole dlr"],
            "sweep": [{"alpha": alpha, "sa": sa, "ra": ra} for alpha, (sa, ra) in enumerate(points)],
        }
        for arm, sweeps in arms.items()
        for seed, points in enumerate(sweeps)
    ]
    return {"runs": runs}


def test_lead_of_a_curve_is_taken_where_both_have_points():
    lower = [{"sa": 60, "ra": 10}, {"sa": 50, "ra": 20}]
    upper = [{"sa": 63, "ra": 10}, {"sa": 53, "ra": 20}, {"sa": 40, "ra": 15}]  # the last lies inside the frontier
    assert findings.lead_of_curve(upper, lower) == pytest.approx(3)
    assert findings.lead_of_curve(lower, upper) == pytest.approx(-3)
    assert findings.lead_of_curve(upper, [{"sa": 50, "ra": 30}, {"sa": 40, "ra": 40}]) is None


def test_dials_are_compared_seed_by_seed_under_the_same_attack():
    low, high = [(60, 10), (50, 20)], [(62, 10), (52, 20)]
    results = dials(a=[high, high], b=[low, high], c=[[(40, 30), (30, 40)]])
    assert findings.curve_row(results, "a", "b", "A")[1:] == [
        *("+1.0 (+0.0 to +2.0), no clear difference at equal RA", "-", "SA > 0", "yes (1 of 2 seeds)")
    ]
    assert findings.curve_row(results, "a", "c", "A") is None  # no common range of RA
    results["runs"][1]["swept_with"] = ["pgd"]
    assert findings.curve_row(results, "a", "b", "A")[1] == "+2.0 (one seed) at equal RA"


def test_the_picture_shows_the_seeds_that_most_dials_have(tmp_path):
    results = dials(jtdmoe=[[(60, 10), (50, 20)], [(70, 30), (60, 40)]], separate_dual=[[(61, 11), (51, 21)]])
    curves, seeds = results_page.dials(results)
    assert seeds == [0] and curves["jtdmoe"][1] == {"alpha": 1, "sa": 50, "ra": 20}
    results_page.draw({"digits": results}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    other = {**results["runs"][0], "arm": "dial_outputs", "seed": 7}
    assert results_page.dials({"runs": [other, *results["runs"]]}) == (curves, seeds)
    results["runs"][-1]["swept_with"] = ["pgd"]
    with pytest.raises(ValueError, match="different attacks"):
        results_page.dials(results)


def test_extra_arms_have_a_folded_table_of_their_own():
    arms = {"single": {"about": "one network"}, "single_awp": {"about": "with AWP", "extra": True}}
    cost = {"ra_pgd": 31, "parameters": 9, "flops": 5, "num_images": 7, "training": {"steps": 2, "passes": 1}}
    runs = [{"arm": arm, "seed": 0, "sa": 50, "ra": 30, **cost} for arm in arms]
    study = {"passes": 1, "settings": {"num_experts": 1}, "arms": arms}
    before, after = results_page.render_study({"study": study, "runs": runs}).split("More arms, some with fewer seeds")
    assert "| single |" in before and "single_awp" not in before and "| single_awp |" in after
