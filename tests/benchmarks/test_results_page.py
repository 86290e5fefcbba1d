"""The README's results section: differences, targets and curves computed from kept studies, never typed."""

import json
from pathlib import Path

import pytest

from training.benchmarks import results_page as script
from training.benchmarks.study import findings as study_findings

BENCHMARKS = Path(__file__).parents[2] / "training" / "benchmarks"


@pytest.fixture(scope="module")
def results_page():
    return script


@pytest.fixture(scope="module")
def findings(results_page):
    return study_findings


DUAL_ARMS = ("separate_clean", "jtdmoe_clean", "separate_dual", "jtdmoe")


def kept(**arms: list[tuple[float, float]]) -> dict:
    """Results of a study: arm -> (SA, RA) by seed."""
    runs = [
        {"arm": arm, "seed": seed, "sa": sa, "ra": ra}
        for arm, pairs in arms.items()
        for seed, (sa, ra) in enumerate(pairs)
    ]
    return {"runs": runs, "arms": dict.fromkeys(arms, {})}


def test_differences_pair_the_seeds_that_both_arms_have(findings):
    results = kept(a=[(50, 30), (52, 31), (60, 40)], b=[(49, 31), (50, 33)])
    assert findings.differences(results, "a", "b", "sa") == [1, 2]
    assert findings.compared(results, "a", "b") == "SA +1.5 (+1.0 to +2.0), RA -1.5 (-2.0 to -1.0)"
    results["runs"][0]["ra"] = 34
    assert "RA +0.5 (-2.0 to +3.0), no clear difference" in findings.compared(results, "a", "b")
    assert findings.compared(kept(a=[(1, 1)], b=[(2, 3)]), "a", "b") == "SA -1.0 (one seed), RA -2.0 (one seed)"


def test_lead_of_a_curve_is_taken_where_both_have_points(findings):
    lower = [{"sa": 60, "ra": 10}, {"sa": 50, "ra": 20}]
    upper = [{"sa": 63, "ra": 10}, {"sa": 53, "ra": 20}, {"sa": 40, "ra": 15}]  # the last lies inside the frontier
    assert findings.lead_of_curve(upper, lower) == pytest.approx(3)
    assert findings.lead_of_curve(lower, upper) == pytest.approx(-3)
    assert findings.lead_of_curve(upper, [{"sa": 50, "ra": 30}, {"sa": 40, "ra": 40}]) is None


def test_aims_say_no_where_the_mean_misses_them_and_how_many_seeds_reach_them(findings):
    results = kept(rt_er=[(50, 30), (53, 31)], single=[(51, 29), (52, 31)])
    for run in results["runs"][:2]:
        run["expert_load"] = [12.0, 88.0]
    for seed, (sa, ra) in enumerate([(55, 28), (52, 29)]):
        dual = {"arm": "jtdmoe", "seed": seed, "sa": sa, "ra": ra, "robust": {"sa": 50, "ra": 30}}
        results["runs"].append(dual)
    results["study"] = {"arms": {"jtdmoe": {}, "separate_dual": {}}}
    rows = {row[0]: row[1:] for row in findings.targets(results)}
    assert len(rows) == len(findings.MIXTURES) + 2 + 1
    found, met = rows["RT-ER, thin experts against one network: RA and SA at least equal"]
    assert found == "RA +0.5 (+0.0 to +1.0), no clear difference; SA +0.0 (-1.0 to +1.0), no clear difference"
    assert met == "yes (1 of 2 seeds)"
    found, met = rows["JTDMoE with F_S at eps / 2 at its alpha against its F_R: SA +3 for at most 1.5 RA"]
    assert found == "SA +3.5 (+2.0 to +5.0); RA -1.5 (-2.0 to -1.0)" and met == "in the mean only (0 of 2 seeds)"
    assert rows["No expert of the RT-ER mixture with less than 5 % of the load"] == [
        "least 12 %",
        "yes (2 of 2 seeds)",
    ]
    assert ["not measured", "-"] in rows.values()
    results["runs"][0] |= {"ra": 28, "expert_load": [4.0, 96.0]}
    assert [row[-1] for row in findings.targets(results)][0] == "**no** (1 of 2 seeds)"
    assert findings.targets(results)[-1][1:] == ["least 4 %", "**no** (1 of 2 seeds)"]


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
    return {"runs": runs, "study": {"arms": dict.fromkeys(DUAL_ARMS, {})}}


def test_dials_are_compared_seed_by_seed_under_the_same_attack(findings):
    low, high = [(60, 10), (50, 20)], [(62, 10), (52, 20)]
    results = dials(jtdmoe=[high, high], separate_dual=[high], separate_clean=[low, high])
    rows = [row[1:] for row in findings.targets_of_curves(results)]
    assert rows[0] == ["not measured", "-"]  # of the paper's JTDMoE
    assert rows[1][0].endswith("SA at equal RA +1.0 (+0.0 to +2.0), no clear difference")
    assert rows[1][1] == "yes (1 of 2 seeds)" and rows[2][1] == "**no** (0 of 1 seeds)"
    results["runs"][-1]["swept_with"] = ["pgd"]
    assert findings.targets_of_curves(results)[1][1].endswith("SA at equal RA +2.0 (one seed)")
    apart = dials(jtdmoe=[low], separate_dual=[[(40, 30), (30, 40)]])
    assert findings.targets_of_curves(apart)[2][1:] == ["no common range of RA", "-"]


def test_the_picture_shows_the_seeds_that_all_dials_have(results_page, tmp_path):
    results = dials(jtdmoe=[[(60, 10), (50, 20)], [(70, 30), (60, 40)]], separate_dual=[[(61, 11), (51, 21)]])
    curves, seeds = results_page.drawn(results)
    assert seeds == [0] and curves["jtdmoe"][1] == {"alpha": 1, "sa": 50, "ra": 20}
    results_page.draw({"digits": results}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    results["runs"][-1]["swept_with"] = ["pgd"]
    with pytest.raises(ValueError, match="different attacks"):
        results_page.drawn(results)


def test_confirmed_numbers_take_the_place_of_the_first(results_page):
    study = {"settings": {"num_experts": 1}, "arms": {"single": {}, "rt_er": {}}}
    cost = {"parameters": 10, "flops": 5, "ra_pgd": 3, "training": {"steps": 2, "passes": 1}}
    runs = [{"arm": arm, "seed": 0, "sa": 50, "ra": 30, **cost} for arm in study["arms"]]
    assert results_page.confirmed({"study": study, "runs": runs}) is None
    runs[0]["confirmed"] = {"sa": 40, "ra": 20, "ra_pgd": 21}
    again = results_page.confirmed({"study": study, "runs": runs})
    assert list(again["arms"]) == ["single"] and again["arms"]["single"]["ra"]["mean"] == 20
    assert runs[0]["sa"] == 50


def test_the_short_table_pairs_seeds_and_takes_a_dial_against_its_own_f_r(findings):
    results = kept(a=[(50, 30), (52, 31), (60, 40)], b=[(49, 31), (50, 33)])
    assert findings.in_short(results, "a", "b") == "SA +1.5, RA -1.5 (2 seeds)"
    assert findings.in_short(results, "a", "none") == "not measured"
    results["runs"][2]["robust"] = {"sa": 58, "ra": 41}
    del results["runs"][:2]
    assert findings.in_short(results, "a", None) == "SA +2.0, RA -1.0 (1 seed)"
    assert findings.in_short({"runs": []}, "a", None) == "not measured"


def test_extra_arms_are_kept_apart(results_page):
    results = kept(single=[(1, 1)], rare=[(2, 2)], dual=[(3, 3)])
    results["study"] = {"arms": {"dual": {}, "rare": {"extra": True}, "single": {"extra": False}, "never_run": {}}}
    usual, extra = results_page.by_extra(results)
    assert (list(usual), list(extra)) == (["single", "dual"], ["rare"])


def test_readme_shows_the_page_of_the_kept_results(results_page, monkeypatch):
    monkeypatch.setattr(results_page, "draw", lambda *_: None)
    assert results_page.page() in results_page.README.read_text()
    assert results_page.summary() in results_page.README.read_text()
    assert results_page.reliability() in results_page.README.read_text()


def test_public_numbers_name_their_source(results_page):
    rows = json.loads((BENCHMARKS / "results" / "public_numbers.json").read_text())["rows"]
    assert all(row["source"] for row in rows) and results_page.public_table().count("\n") == len(rows) + 1


def test_a_missing_study_is_named(results_page, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    assert results_page.main() == 2
    assert "run the study 'cifar10'" in capsys.readouterr().err
