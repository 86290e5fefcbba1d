"""The README's results section: differences, targets and curves computed from kept studies, never typed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "training" / "benchmarks"


@pytest.fixture(scope="module")
def results_page():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("results_page", BENCHMARKS / "results_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(BENCHMARKS))
    return module


def kept(**arms: list[tuple[float, float]]) -> dict:
    """Results of a study: arm -> (SA, RA) by seed."""
    runs = [
        {"arm": arm, "seed": seed, "sa": sa, "ra": ra}
        for arm, pairs in arms.items()
        for seed, (sa, ra) in enumerate(pairs)
    ]
    return {"runs": runs, "arms": dict.fromkeys(arms, {})}


def test_differences_pair_the_seeds_that_both_arms_have(results_page):
    results = kept(a=[(50, 30), (52, 31), (60, 40)], b=[(49, 31), (50, 33)])
    assert results_page.differences(results, "a", "b", "sa") == [1, 2]
    assert results_page.compared(results, "a", "b") == "SA +1.5 (+1.0 to +2.0), RA -1.5 (-2.0 to -1.0)"
    results["runs"][0]["ra"] = 34
    assert "RA +0.5 (-2.0 to +3.0), no clear difference" in results_page.compared(results, "a", "b")
    assert results_page.compared(kept(a=[(1, 1)], b=[(2, 3)]), "a", "b") == "SA -1.0 (one seed), RA -2.0 (one seed)"


def test_lead_of_a_curve_is_taken_where_both_have_points(results_page):
    lower = [{"sa": 60, "ra": 10}, {"sa": 50, "ra": 20}]
    upper = [{"sa": 63, "ra": 10}, {"sa": 53, "ra": 20}, {"sa": 40, "ra": 15}]  # the last lies inside the frontier
    assert results_page.lead_of_curve(upper, lower) == pytest.approx(3)
    assert results_page.lead_of_curve(lower, upper) == pytest.approx(-3)
    assert results_page.lead_of_curve(upper, [{"sa": 50, "ra": 30}, {"sa": 40, "ra": 40}]) is None


def test_targets_say_no_where_a_target_is_missed(results_page):
    results = kept(rt_er=[(50, 30)], single=[(51, 29)])
    sweep = [{"sa": 60, "ra": 10}, {"sa": 50, "ra": 20}]
    dual = {"gain_sa": {"mean": 3.2}, "loss_ra": {"mean": 1.4}, "sweep": sweep}
    better = [{"sa": 62, "ra": 10}, {"sa": 52, "ra": 20}]
    results["arms"] = {"rt_er": {"least_load": 12.0}, "jtdmoe": {**dual, "sweep": better}}
    results["arms"] |= {"separate_dual": {**dual, "sweep": better}, "separate_clean": {"sweep": sweep}}
    rows = results_page.targets(results)
    assert [row[-1] for row in rows] == ["**no**", "yes", "yes", "yes", "yes", "**no**"]
    assert rows[4][1].startswith("SA +2.0 at equal RA") and rows[5][1].startswith("SA +0.0 at equal RA")
    results = {**results, **kept(rt_er=[(51, 29)], single=[(51, 29)]), "arms": results["arms"]}
    assert [row[-1] for row in results_page.targets(results)][0] == "yes"
    results["arms"] = {"rt_er": {"least_load": 4.0}}  # a study without dual models
    assert [row[-1] for row in results_page.targets(results)] == ["yes", "**no**"]


def test_public_numbers_name_their_source(results_page):
    rows = json.loads((BENCHMARKS / "results" / "public_numbers.json").read_text())["rows"]
    assert all(row["source"] for row in rows) and results_page.public_table().count("\n") == len(rows) + 1


def test_a_missing_study_is_named(results_page, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    assert results_page.main() == 2
    assert "run the study 'cifar10'" in capsys.readouterr().err
