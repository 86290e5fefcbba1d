"""Cards of all kinds of reports: read back by the Hub's parser, with no number that the report does not have."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hf_dualmoe.evaluation.report import RobustnessReport
from hf_dualmoe.hub.model_card import (
    MARKER,
    CardSubject,
    check_card,
    create_model_card,
    reason_to_keep,
    refresh_model_card,
    write_model_card,
)

SHIPPED = Path(__file__).parents[2] / "model_cards" / "digits_dual"
REAL = json.loads((Path(__file__).parents[1] / "doubted_results.json").read_text())  # of a model that fails two checks
PLOTS = ("eps_curve.png", "examples.png", "expert_load.png", "tradeoff.png")


def dual(**changes) -> RobustnessReport:
    return RobustnessReport(**{**copy.deepcopy(REAL), **changes})


def moe(**changes) -> RobustnessReport:
    attacks = {"ra_pgd20": "PGD(eps=0.5)", "autoattack": "standard, seed 0"}
    certified = {"radius": 0.25, "norm": "l2", "accuracy": 22.22, "method": "smoothing", "confidence": 0.999}
    measured = {"sa": 81.25, "ra_pgd20": 43.75, "ra_autoattack": 37.5, "ra_worst_case": 31.26, "route_flip_rate": 12.5}
    measured |= {"intervals": {"sa": [70.1, 89.2], "ra_autoattack": [26.3, 50.1]}, "certified": [certified]}
    fields = {
        "model": {"kind": "mixture of experts", "parameters": 1234, "backbone": "resnet18", "num_experts": 3},
        "dataset": {"name": "user/birds", "num_images": 60, "class_names": ["owl", "tit"]},
        "threat": {"norm": "l2", "eps": 0.5, "attacks": attacks},
        "metrics": measured | {"expert_load": {"clean": [20.0, 30.0, 50.0], "attacked": [40.0, 30.0, 30.0]}},
        "controls": {"one network": {"sa": 79.17, "ra_pgd20": 41.67, "parameters": 400}, "failed one": {}},
        "training": {"method": "rt_er", "dataset_id": "user/birds", "base_model": "timm/resnet18.a1_in1k", "eps": 0.5},
        "seeds": {"evaluation": 0},
    }
    return RobustnessReport(**{**fields, **changes})


def other(**changes) -> RobustnessReport:
    fields = {
        "model": {"kind": "ViTForImageClassification", "parameters": 99},
        "dataset": {"name": "/home/jane/secret place/birds", "num_images": 1, "class_names": ["owl", "tit"]},
        "threat": {"norm": "linf", "eps": 8 / 255, "attacks": {"ra_pgd20": "PGD(steps=20)"}},
        "metrics": {"sa": 100.0, "ra_pgd20": 0.0},
    }
    return RobustnessReport(**{**fields, **changes})


REPORTS = {
    "dual": dual(),
    "moe": moe(),
    "any model": other(),
    "failures": dual(failures={"worst case 20 steps": "MemoryError: a | b\nc"}, suspicious=[], sanity={}),
    "clean only": moe(metrics={"sa": 81.25}, threat={}, controls={}, training={}),
    "not finite": moe(metrics={"sa": 81.25, "ra_pgd20": float("nan"), "ra_square": None}),
    "nothing": moe(metrics={}),
    "bare": RobustnessReport(model={}, dataset={}, threat={}, metrics={"sa": 50.0}),
}
EVERY = pytest.mark.parametrize("name", REPORTS)


def render(report: RobustnessReport | None, **subject) -> ModelCard:
    return create_model_card(report, CardSubject("my-model", **subject))


def accuracies(metrics: dict) -> dict[str, float]:
    """The accuracies of a report that are numbers, by hand."""
    found = {k: v for k, v in metrics.items() if k == "sa" or k.startswith("ra_")}
    return {k: v for k, v in found.items() if v is not None and v == v}


# --- read back -------------------------------------------------------------------------------------------------------


@EVERY
def test_parser_of_the_hub_reads_the_results_back(name, tmp_path):
    report = REPORTS[name]
    render(report, repo_id="user/my-model").save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    described = (card.data.pipeline_tag, card.data.library_name, card.data.license)
    assert described == ("image-classification", "transformers", "apache-2.0")
    results = card.data.eval_results or []
    robust = [r for r in results if r.metric_type != "certified_accuracy"]
    expected = sorted(accuracies(report.metrics).values())
    assert sorted(r.metric_value for r in robust) == pytest.approx(expected, abs=0.00501)
    assert [r.metric_type for r in robust[:1]] == ["accuracy"] * bool(robust)
    for result in robust[1:]:
        assert [result.metric_args[name] for name in ("eps", "norm")] == [report.threat[n] for n in ("eps", "norm")]
    assert all(result.dataset_name and result.dataset_type for result in results)


def test_results_carry_settings_intervals_and_doubts():
    by_name = {result.metric_name: result for result in render(dual()).data.eval_results}
    args = by_name["PGD-20"].metric_args
    assert args["attack"] == REAL["threat"]["attacks"]["ra_pgd20"] and args["doubted"] is True
    assert args["interval_95"] == REAL["metrics"]["intervals"]["ra_pgd20"]
    assert by_name["adaptive union"].metric_args["attack"] == REAL["threat"]["attacks"]["worst_case"]
    certified = [r for r in render(moe()).data.eval_results if r.metric_type == "certified_accuracy"]
    assert [(r.metric_value, r.metric_args["radius"]) for r in certified] == [(22.22, 0.25)]
    assert "doubted" not in render(moe()).data.eval_results[1].metric_args


def test_metadata_of_the_training():
    data = render(moe()).data
    assert data.datasets == ["user/birds"] and data.base_model == "timm/resnet18.a1_in1k"
    assert data.base_model_relation == "finetune" and "mixture-of-experts" in data.tags
    data = render(dual()).data
    assert data.datasets is None and data.base_model is None and {"dual-model", "custom_code"} <= set(data.tags)
    data = render(other(), config={"model_type": "vit"}).data
    assert not {"dual-model", "mixture-of-experts", "custom_code", "timm"} & set(data.tags)


def test_a_setting_that_is_on_or_off_reads_as_words():
    report = moe()
    report.model["calibration"] = {"accepted": True, "alpha": 0.7}
    report.training["shuffled"] = False
    text = render(report).text
    assert "| calibration | accepted: yes, alpha: 0.7 |" in text and "| shuffled | no |" in text


def test_license_follows_that_of_the_pretrained_weights():
    weights = "timm/resnet18.fb_swsl_ig1b_ft_in1k"  # not for commercial use
    assert render(moe(training={"base_model": weights})).data.license == "cc-by-nc-4.0"
    assert create_model_card(moe(), CardSubject("m"), license="mit", tags="mine").data.to_dict()["license"] == "mit"


# --- the text --------------------------------------------------------------------------------------------------------


def numbers(value) -> set[str]:
    """All numbers of a report as the card writes them, and those inside its strings."""
    if isinstance(value, dict):
        return set().union(*(numbers(v) for v in [*value.keys(), *value.values()]), set())
    if isinstance(value, list):
        return set().union(*(numbers(v) for v in value), set())
    if isinstance(value, str):
        return set(re.findall(r"\d+\.\d+", value))
    if isinstance(value, float):
        return {f"{value:.1f}", f"{value:.2f}", f"{value:g}", f"{value:.3g}", f"{value:.6g}"}
    return set()


@EVERY
def test_every_number_is_in_the_text_and_none_is_invented(name):
    report = REPORTS[name]
    text = render(report, plots=PLOTS).text
    for value in accuracies(report.metrics).values():
        assert f"| {value:.2f} |" in text
    for reason in (*report.suspicious, *report.failures):
        assert reason in text
    for own in ("arXiv:2502.06832", "set_alpha(0.8)", "alpha=0.9)"):  # of the template
        text = text.replace(own, "")
    assert set(re.findall(r"\d+\.\d+", text)) <= numbers(vars(report))


@EVERY
def test_what_was_not_measured_is_left_out(name):
    report = REPORTS[name]
    text = render(report).text
    for part, present in {
        "AutoAttack": "ra_autoattack" in report.metrics,
        "### Certified accuracy": "certified" in report.metrics,
        "## The dial": "alpha" in report.model,
        "## How robust it is": bool(accuracies(report.metrics)),
        "No other model was measured": bool(accuracies(report.metrics)) and not report.controls,
        "The training settings are not known": not report.model,
    }.items():
        assert (part in text) == present, part
    assert not re.search(r"\bnan\b|None|\{\{|\{%|\bnull\b", re.sub(r"`[^`\n]+`", "", text))  # outside settings


@EVERY
def test_tables_are_whole(name):
    tables = re.findall(r"(?:^\|.*\n)+", render(REPORTS[name], plots=PLOTS).text, flags=re.M)
    for table in tables:
        rows = [re.split(r"(?<!\\)\|", line) for line in table.splitlines()]
        assert len(rows) >= 3 and len({len(row) for row in rows}) == 1, table
        assert set("".join(rows[1])) <= set(" -:")


def test_headline_is_the_strongest_attack():
    assert "**31.26 %**" in render(moe()).text
    assert "**26.28 % (95 % interval 22.4 to 30.5)**" in render(dual()).text
    text = render(other()).text
    assert "**0.00 %** when every image is attacked within L∞ 8/255 (PGD-20)" in text and "Stronger attacks" in text
    two = other(metrics={"sa": 100.0, "ra_pgd20": 40.0, "ra_expert_pgd20": 60.0})
    assert "**40.00 %** when every image is attacked within L∞ 8/255 (PGD-20)" in render(two).text
    assert "has not been measured" in render(REPORTS["clean only"]).text


def test_cautions():
    assert "2 sanity checks of the evaluation failed" in render(dual()).text
    assert "1 measurement failed" in render(REPORTS["failures"]).text and "Read before" not in render(moe()).text
    turned = render(dual(), config={"model_type": "dual_moe", "alpha": 1.0}).text
    assert "measured at alpha = 0.9, but the saved dial is at alpha = 1." in turned
    plain = render(moe(training={"method": "standard"})).text
    assert "expect no robustness" in plain and "built to stay right" not in plain


def test_controls_and_components_stand_beside_the_model():
    text = render(moe()).text
    for row in ("**this model** | 81.25 | 43.75 | 37.50 | 31.26", "one network | 79.17 | 41.67 | - | -"):
        assert f"| {row} |" in text
    weaker = moe()
    weaker.controls["one network"]["ra_worst_case"] = 41.67  # of PGD alone
    assert "one network | 79.17 | 41.67 | - | - |" in render(weaker).text
    assert "| robust model alone, PGD-20 | 55.46 |" in render(dual()).text
    costly = moe(training={"method": "rt_er", "passes": 40.2})
    costly.controls["one network"]["passes"] = 103.4
    text = render(costly).text
    assert "| **this model** | 40 | 81.25 |" in text and "| one network | 103 | 79.17 |" in text
    assert "| failed one | - | - |" in text


def test_the_dial_of_a_standard_model_that_knows_attacks_is_described_as_it_is():
    for eps, mild in ((0.0, False), (4 / 255, True)):
        text = render(dual(training={"method": "jtdmoe", "standard_eps": eps})).text
        assert ("trained on mild attacks" in text) == mild and ("helpless under attack" in text) != mild


def test_the_record_is_named_where_there_is_one():
    assert "can be counted again" in render(moe(outcomes="outcomes.parquet")).text
    assert "in `outcomes.parquet`" in render(moe(outcomes="outcomes.parquet")).text
    assert "counted again" not in render(moe()).text


def test_what_each_precision_of_autoattack_found_is_told():
    found = {"confirmed": 31, "again_in_fp32": 4, "survivors_in_fp32": 2, "not_confirmed": 1}
    text = render(moe(metrics={**moe().metrics, "autoattack_sources": found})).text
    assert "searched in half precision. Images broken: 31 there, confirmed in fp32; 4 by the same" in text
    assert "half precision" not in render(moe()).text


def test_plots_are_shown_where_they_exist():
    for plots in ((), ("tradeoff.png",), (*PLOTS, "certified.png")):
        assert sorted(re.findall(r"\]\((\S+\.png)\)", render(dual(), plots=plots).text)) == sorted(plots)


def test_paths_and_markup_do_not_get_out_of_hand():
    text = str(render(other()))
    assert "jane" not in text and "secret" not in text and "birds" in text
    hostile = other(dataset={"name": "a|b\n# big {{ 7 * 7 }}", "num_images": 2}, failures={"x": "{{ 7 * 7 }}"})
    text = render(hostile).text
    assert "x: {{ 7 * 7 }}" in text and "# big {{ 7 * 7 }}" in text and "\n# big" not in text


def test_card_without_a_report(tmp_path):
    card = render(None, config={"model_type": "robust_moe", "auto_map": {}, "backbone": "resnet18", "num_experts": 2})
    assert "not been measured yet" in card.text and card.data.eval_results is None and "custom_code" in card.data.tags
    assert "mixture of 2 experts" in card.text and "## How robust it is" not in card.text


def test_code_of_the_card_runs(make_dual, tmp_path, monkeypatch, capsys):
    make_dual().save_pretrained(tmp_path / "model")
    Image.new("RGB", (40, 50), (9, 99, 199)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", write_model_card("model").read_text(), flags=re.S)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block.replace("path/to/this/folder", "model"), names)
    assert capsys.readouterr().out.strip() in names["model"].config.id2label.values()
    assert names["model"].config.alpha == 0.8 and torch.is_tensor(names["pixel_values"])


# --- files -----------------------------------------------------------------------------------------------------------


def test_folder_is_rendered_again_but_not_over_somebodys_words(tmp_path):
    dual().save(tmp_path / "results.json")
    path = write_model_card(tmp_path)
    first = path.read_text()
    assert MARKER in first and write_model_card(tmp_path) == path and path.read_text() == first
    moe().save(tmp_path / "results.json")
    write_model_card(tmp_path)
    assert path.read_text() != first
    path.write_text("---\nlicense: mit\n---\nMine.\n")
    assert write_model_card(tmp_path) is None and path.read_text().endswith("Mine.\n")


def test_name_is_that_of_the_run(tmp_path):
    for folder, repo_id, title in (("run-7/model", None, "run-7"), ("thing", None, "thing"), ("x", "me/it", "it")):
        (tmp_path / folder).mkdir(parents=True)
        assert f"\n# {title}\n" in write_model_card(tmp_path / folder, dual(), repo_id=repo_id).read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', '{"colour": 1}'])
def test_broken_results_are_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json is not a report of hf_dualmoe"):
        write_model_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pipeline_tag: image-classification", "pipeline_tag: text-generation", "pipeline_tag='text-generation'"),
        ("library_name: transformers\n", "", "library_name=None"),
        ("license: apache-2.0\n", "", "no license"),
        ("value: 94.88", "value: about 95", "'about 95'"),
        ("    - type: accuracy\n", "    - kind: accuracy\n", "cannot be read"),
    ],
)
def test_invalid_cards_are_refused(old, new, message):
    text = str(render(dual()))
    assert old in text
    with pytest.raises(ValueError, match=message):
        check_card(text.replace(old, new, 1))


def test_a_report_on_another_function_is_not_kept():
    """Better numbers of what the model was before its dial was turned or its weights changed are not its own."""
    whole, less = {**REAL["model"], "weights": "abc", "robust_logit_map": None}, {"metrics": {"sa": 94.0}}
    old = dual(model=whole)
    for change, kept in (
        ({}, True),
        ({"weights": "abd"}, False),
        ({"alpha": 0.8}, False),
        ({"mixing": "logits"}, False),
        ({"robust_logit_map": {"scale": 2.0}}, False),
    ):
        assert bool(reason_to_keep(old, dual(model={**whole, **change}, **less))) == kept
    assert reason_to_keep(dual(), dual(model=whole, **less))  # says nothing of its weights: counts as the same
    config = {"alpha": 0.9, "mixing": "probs", "robust_logit_map": {"scale": 2.0}}
    assert (
        reason_to_keep(None, old, config) == "is at robust_logit_map = None, where the saved model has {'scale': 2.0}"
    )
    assert reason_to_keep(None, old, {**config, "robust_logit_map": None}) == ""
    card = render(old, config={"model_type": "dual_moe", **config}).text
    assert "measured with another robust_logit_map than the saved model has" in card


DIGITS = {**REAL["dataset"], "digest": "of 449", "taken_from": "of all"}
FULL = {"dataset": DIGITS, "outcomes": "outcomes.parquet", "controls": {"before": {"sa": 90.0}}}


def attacked(name: str, old: str, new: str) -> dict:
    """The threat of the report with another description of an attack."""
    attacks = REAL["threat"]["attacks"]
    assert old in attacks[name]
    return {"threat": {**REAL["threat"], "attacks": {**attacks, name: attacks[name].replace(old, new)}}}


KEPT = [  # what another evaluation says, and why it does not take the place; "" = it does
    ("same", {}, ""),
    ("more", {"metrics": {**REAL["metrics"], "ra_autoattack": 20.0}}, ""),
    ("all images", {"dataset": {**DIGITS, "digest": "of all", "num_images": 1797}}, ""),
    ("no digest", {"dataset": {**REAL["dataset"], "num_images": 500}}, ""),
    ("other seed", attacked("ra_pgd20", "seed=0", "seed=42"), ""),
    ("more steps", attacked("worst_case", "20 APGD steps", "100 APGD steps"), ""),
    ("fewer steps", attacked("worst_case", "20 APGD steps", "1 APGD steps"), "has worst_case by adaptive union, 1 "),
    ("other attack", attacked("ra_pgd20", "keep_best=True", "keep_best=False"), "has ra_pgd20 by PGD"),
    ("attack unknown", {"threat": {**REAL["threat"], "attacks": {}}}, "has ra_pgd20 by an unknown attack instead "),
    ("less measured", {"metrics": {"sa": 94.0, "ra_pgd20": 50.0}}, "lacks intervals, components, expert_load, "),
    ("other radius", {"threat": {**REAL["threat"], "eps": 0.1}}, "is within L∞ 0.1 instead of L∞ 0.15"),
    ("other images", {"dataset": {**DIGITS, "digest": "of 449 others"}}, "is of other images"),
    ("fewer images", {"dataset": {**REAL["dataset"], "num_images": 100}}, "is of other images"),
    ("other data", {"dataset": {**REAL["dataset"], "name": "mnist"}}, "is of other images"),
    ("no dial", {"alpha_sweep": [], "alpha_choice": {}}, "lacks dial at alpha=0, "),
    ("less of the dial", {"alpha_sweep": REAL["alpha_sweep"][:4]}, "lacks dial at alpha=1"),
    ("no sanity checks", {"sanity": {"worst_case": {"passed": True, "message": ""}}}, "lacks check batch_size, "),
    ("no record", {"outcomes": ""}, "lacks outcomes"),
    ("no control", {"controls": {}}, "lacks control before"),
]


@pytest.mark.parametrize(("changes", "reason"), [case[1:] for case in KEPT], ids=[case[0] for case in KEPT])
def test_refresh_replaces_a_report_only_where_nothing_is_lost(tmp_path, changes, reason):
    model, output = tmp_path / "model", tmp_path / "evaluation"
    for folder in (model, output):
        folder.mkdir()
    (model / "config.json").write_text('{"model_type": "dual_moe", "alpha": 0.9}')
    (model / "expert_load.png").write_bytes(b"old")
    (output / "tradeoff.png").write_bytes(b"new")
    (output / "outcomes.parquet").write_bytes(b"record")
    old, new, taken = dual(**FULL), dual(**FULL | changes, seeds={"evaluation": 7}), not reason
    old.save(model / "results.json")
    assert reason_to_keep(old, new).startswith(reason) and bool(reason_to_keep(old, new)) != taken
    path = refresh_model_card(new, output, model)
    assert path == (model if taken else output) / "README.md" and path.is_file()
    assert RobustnessReport.load(model / "results.json").seeds == ({"evaluation": 7} if taken else REAL["seeds"])
    assert (model / "tradeoff.png").exists() == taken and (model / "expert_load.png").exists() != taken
    assert (model / "outcomes.parquet").exists() == taken


def test_refresh_of_a_model_on_the_hub_writes_beside_the_evaluation(tmp_path):
    path = refresh_model_card(moe(), tmp_path, "user/birds-moe")
    assert path.parent == tmp_path and '"user/birds-moe", revision="<commit>"' in path.read_text()


@pytest.mark.parametrize(
    "shipped", sorted(path.parent for path in SHIPPED.parent.glob("*/results.json")), ids=lambda folder: folder.name
)
def test_shipped_card_is_that_of_its_results(shipped, tmp_path):
    folder = tmp_path / shipped.name
    folder.mkdir()
    for path in (*shipped.glob("*.png"), shipped / "results.json", shipped / "config.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert write_model_card(folder).read_text() == (shipped / "README.md").read_text()
