"""The robust-accuracy metric: numbers by hand and by scipy, errors, and the `evaluate` module offline."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import hf_dualmoe
from hf_dualmoe.evaluation.metrics import robust_accuracy, wilson_interval

FOLDER = Path(hf_dualmoe.__file__).parent / "evaluation" / "metrics" / "robust_accuracy"
CLEAN, ATTACKED, LABELS = [0, 1, 1, 2, 2, 0, 1], [0, 1, 0, 2, 0, 2, 2], [0, 1, 1, 2, 2, 2, 4]
# image 5 is right under attack and wrong clean: not robust


@pytest.mark.parametrize(
    "successes,total", [(0, 1), (1, 1), (0, 200), (200, 200), (1, 60), (30, 60), (5436, 10000), (2, 3)]
)
@pytest.mark.parametrize("confidence_level", [0.5, 0.95, 0.999])
def test_wilson_interval_agrees_with_scipy(successes, total, confidence_level):
    expected = binomtest(successes, total).proportion_ci(confidence_level, method="wilson")
    found = wilson_interval(successes, total, confidence_level)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert 0 <= found[0] <= 100 * successes / total <= found[1] <= 100


def test_wilson_interval_defaults_to_95_percent():
    assert wilson_interval(8, 10) == wilson_interval(8, 10, 0.95) != wilson_interval(8, 10, 0.9)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((3, 0), "total=0 must be at least 1"),
        ((4, 3), r"successes=4 must be in \[0, total\] = \[0, 3\]"),
        ((-1, 3), "successes=-1"),
        ((1, 3, 1.0), r"confidence_level=1.0 must be in \(0, 1\)"),
        ((1, 3, 95), "confidence_level=95"),
    ],
)
def test_wilson_interval_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        wilson_interval(*arguments)


def test_counts_by_hand():
    result = robust_accuracy(CLEAN, np.array(ATTACKED), torch.tensor(LABELS), 0.9)
    assert (result["num_images"], result["num_clean_correct"], result["num_robust"]) == (7, 5, 3)
    assert result["sa"] == pytest.approx(500 / 7) and result["ra"] == pytest.approx(300 / 7)
    assert result["sa_interval"] == list(wilson_interval(5, 7, 0.9))
    assert result["ra_interval"] == list(wilson_interval(3, 7, 0.9))
    assert result["per_class_ra"] == pytest.approx({0: 100, 1: 50, 2: 100 / 3, 4: 0})
    assert result["per_class_count"] == {0: 1, 1: 2, 2: 3, 4: 1}
    assert result["per_class_ra_interval"][2] == list(wilson_interval(1, 3, 0.9))
    assert json.loads(json.dumps(result))["confidence_level"] == 0.9


@pytest.mark.parametrize(
    "changed,message",
    [
        ({"predictions": [0, 1]}, "clean_predictions=7, predictions=2, references=7"),
        ({"references": [0, 1, 1, 2, 2, 2, -1]}, "references contains -1; class indices must be >= 0"),
        ({"clean_predictions": [0.5] * 7}, "clean_predictions has dtype float64; expected integer"),
        ({"predictions": [[0]] * 7}, r"predictions has shape \(7, 1\)"),
        ({"references": []}, r"references has shape \(0,\); expected \(images,\) with at least one"),
        ({"confidence_level": 0}, "confidence_level=0"),
    ],
)
def test_counts_refuse(changed, message):
    with pytest.raises(ValueError, match=message):
        robust_accuracy(**{"clean_predictions": CLEAN, "predictions": ATTACKED, "references": LABELS, **changed})


@pytest.fixture
def metric():
    evaluate = pytest.importorskip("evaluate")
    return evaluate.load(str(FOLDER))


def test_evaluate_module_computes_at_once_and_in_batches(metric, tmp_path):
    expected = robust_accuracy(CLEAN, ATTACKED, LABELS)
    inputs = {"clean_predictions": CLEAN, "predictions": ATTACKED, "references": LABELS}
    assert metric.compute(**inputs) == expected
    for rows in (slice(0, 3), slice(3, 7)):
        metric.add_batch(**{name: torch.tensor(values[rows]) for name, values in inputs.items()})
    assert metric.compute(confidence_level=0.8) == robust_accuracy(CLEAN, ATTACKED, LABELS, 0.8)
    for row in zip(*inputs.values(), strict=True):
        metric.add(**dict(zip(inputs, row, strict=True)))
    assert metric.compute() == expected


@pytest.mark.parametrize("name", ["README.md", "robust_accuracy.py"])
def test_paths_to_load_the_metric_from_are_right(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    paths = re.findall(r'evaluate\.load\("(?:path/to/)?(hf_dualmoe/[^"]*)"', text)
    assert paths and all((FOLDER.parents[3] / path).samefile(FOLDER) for path in paths)


def test_evaluate_module_says_what_is_wrong(metric):
    inputs = {"clean_predictions": CLEAN, "predictions": ATTACKED, "references": LABELS}
    with pytest.raises(ValueError, match="references contains -3"):
        metric.compute(**{**inputs, "references": [-3] * 7})
    with pytest.raises(ValueError, match="confidence_level=2"):
        metric.compute(**inputs, confidence_level=2)
    with pytest.raises(ValueError, match="clean_predictions"):
        metric.compute(predictions=ATTACKED, references=LABELS)
    with pytest.raises(ValueError):
        metric.compute(clean_predictions=CLEAN, predictions=ATTACKED[:4], references=LABELS)
    assert metric.compute(**inputs) == robust_accuracy(CLEAN, ATTACKED, LABELS)  # a failed call leaves nothing behind


def test_evaluate_module_is_importable_as_part_of_the_package():
    pytest.importorskip("evaluate")
    from hf_dualmoe.evaluation.metrics.robust_accuracy.robust_accuracy import RobustAccuracy

    result = RobustAccuracy().compute(clean_predictions=[1, 0], predictions=[1, 1], references=[1, 0])
    assert (result["sa"], result["ra"]) == (100.0, 50.0)
    assert "confidence_level" in RobustAccuracy().inputs_description
