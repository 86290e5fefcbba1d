"""Model cards: a `RobustnessReport` rendered to the README.md of a model.

Every number on a card comes from the report (`results.json`); what was not measured is left out. The metadata are
those of https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.environment import write_text
from ..evaluation.outcomes import OUTCOMES_NAME
from ..evaluation.report import RobustnessReport, same_images
from ..models.loading import MARKER, is_foreign
from .card_facts import (
    accuracies,
    attack_settings,
    ball,
    certified,
    data_name,
    has_code,
    interval,
    is_dual,
    metric_title,
    number,
    radius,
)
from .card_text import PLOTS, CardSubject, model_text, results_text, squeeze, training_text

CARD_NAME, RESULTS_NAME, CONFIG_NAME = "README.md", "results.json", "config.json"
LISTS = {"tags", "datasets"}  # metadata that may be given as one string too
MOST_NAMED = 3  # things that a report lacks
DIAL = ("alpha", "mixing", "standard_logit_map", "robust_logit_map")  # of a dual model: config and report have it
# in descriptions of attacks
SEED, EFFORT = re.compile(r"seed=-?\d+"), re.compile(r"(\d+) (APGD step|restart)s?")
TEMPLATE = Path(__file__).with_name("model_card_template.md")

# --- writing ---------------------------------------------------------------------------------------------------------


def create_model_card(report: RobustnessReport | None, subject: CardSubject, **metadata: Any) -> ModelCard:
    """Render the card of a model.

    Args:
        report: What was measured; None = nothing, and the card says so.
        subject: Name, origin, configuration and plots.
        metadata: Further or other fields of `ModelCardData`, such as `license` or `tags` (added to ours).

    Raises:
        ValueError: The card would not be valid; see `check_card`.
    """
    card = ModelCard.from_template(
        create_card_data(report, subject, **metadata),
        template_path=str(TEMPLATE),
        marker=MARKER,
        **model_text(report, subject),
        **results_text(report),
        **training_text(report),
    )
    card.text = squeeze(card.text)
    check_card(card)  # rendering checks nothing
    return card


def write_model_card(
    folder: str | os.PathLike, report: RobustnessReport | None = None, *, repo_id: str | None = None, **metadata: Any
) -> Path | None:
    """Write README.md into a folder that holds a model or an evaluation, in one step.

    Args:
        folder: Folder; its config.json and plots are used where it has them.
        report: What was measured; None = the folder's results.json, if there is one.
        repo_id: As in `CardSubject`.
        metadata: As in `create_model_card`.

    Returns:
        The file, or None where the folder has a README.md that was not rendered by us: it is left alone.

    Raises:
        ValueError: results.json or config.json cannot be read, or the card would not be valid.
    """
    path = Path(folder, CARD_NAME)
    if path.is_file() and not is_rendered(path.read_text(encoding="utf-8")):
        return None
    write_text(path, str(render_folder(folder, report, repo_id=repo_id, **metadata)))
    return path


def render_folder(
    folder: str | os.PathLike, report: RobustnessReport | None = None, *, repo_id: str | None = None, **metadata: Any
) -> ModelCard:
    """The card that `write_model_card` would write."""
    folder = Path(folder)
    config = read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    plots = sorted(path.name for path in folder.glob("*.png"))
    name = metadata.pop("model_name", None) or model_name(folder, repo_id)
    return create_model_card(
        load_report(folder) if report is None else report, CardSubject(name, repo_id, config, plots), **metadata
    )


def refresh_model_card(
    report: RobustnessReport, output_dir: str | os.PathLike, model: str | os.PathLike
) -> Path | None:
    """Put a new evaluation on the card of the evaluated model.

    Where `model` is a local folder and nothing that its own report says is lost (`reason_to_keep`), report, record and
    plots are copied there and its card is rendered again. Otherwise a card is written beside the evaluation, in
    `output_dir`.

    Returns:
        The card, or None where it is in the hands of somebody; see `write_model_card`.

    Raises:
        ValueError: The folder holds a model that this project did not make; nothing is written there.
    """
    folder, output_dir = Path(model), Path(output_dir)
    if is_foreign(folder):
        raise ValueError(f"model={str(model)!r} was not made by hf_dualmoe; it gets no card.")
    if not (folder / CONFIG_NAME).is_file():
        return write_model_card(output_dir, report, repo_id=str(model), model_name=folder.name)
    if reason_to_keep(load_report(folder), report, read_json(folder / CONFIG_NAME)):
        return write_model_card(output_dir, report, model_name=model_name(folder))
    if folder.resolve() != output_dir.resolve():  # an evaluation into the model's own folder is there already
        report.save(folder / RESULTS_NAME)
        for name in (OUTCOMES_NAME, *PLOTS):
            (folder / name).unlink(missing_ok=True)  # of the evaluation before: they would not fit these numbers
            if (output_dir / name).is_file():
                shutil.copyfile(output_dir / name, folder / name)
    return write_model_card(folder, report)


def reason_to_keep(
    old: RobustnessReport | None, new: RobustnessReport, config: Mapping[str, Any] | None = None
) -> str:
    """Why the report in a model's folder stays, as what the new evaluation is or does; "" = the new one replaces it.

    It does where nothing is lost: it is of the same images, or all those that they were chosen from, within the same
    radius, has all that the old one has, and its attacks are no weaker. It also does where the old one is of another
    model by now, its weights or its dial having changed since; what a report does not say of them counts as the same.

    Args:
        old, new: The reports; old None = there is none.
        config: The folder's config.json: an evaluation at another dial or logit map than the saved is not of it.
    """
    for name in DIAL:
        if config and name in config and config[name] != new.model.get(name, config[name]):
            return f"is at {name} = {new.model[name]}, where the saved model has {config[name]}"
    if old is None or not is_same_model(old.model, new.model):
        return ""
    if not covers(new.dataset, old.dataset):
        return "is of other images"
    if ball(new) != ball(old):
        return f"is within {radius(new) or 'no radius'} instead of {radius(old) or 'no radius'}"
    there = contents(new)
    if lost := [name for name in contents(old) if name not in there]:
        return f"lacks {', '.join(lost[:MOST_NAMED])}{', ...' * (len(lost) > MOST_NAMED)}"
    attacks = new.threat.get("attacks", {})
    for name, attack in old.threat.get("attacks", {}).items():
        if not is_as_strong(found := attacks.get(name, "an unknown attack"), attack):
            return f"has {name} by {found} instead of {attack}"
    return ""


def is_same_model(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the `model` of two reports is one function, as far as both say it."""
    return all(old[name] == new[name] for name in ("weights", *DIAL) if name in old and name in new)


def covers(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a report's `dataset` has all images of another's; by name and number where one has no digest."""
    if same_images(new, old):
        return True
    if new.get("digest") and old.get("digest"):
        return new["digest"] == old.get("taken_from")
    return new.get("name") == old.get("name") and new.get("num_images", 0) >= old.get("num_images", 0)


def contents(report: RobustnessReport) -> list[str]:
    """Names of all that a report has to tell."""
    dial = [f"dial at alpha={point['alpha']:g}" for point in report.alpha_sweep]
    more = [name for name in ("alpha_choice", "outcomes") if getattr(report, name)]
    checks, controls = [f"check {name}" for name in report.sanity], [f"control {name}" for name in report.controls]
    return [*report.metrics, *dial, *more, *checks, *controls]


def is_as_strong(new: str, old: str) -> bool:
    """Whether two descriptions are of one attack, whatever its seed, with no less effort in the new one."""
    same = [EFFORT.sub(r"n \2", SEED.sub("", attack)) for attack in (new, old)]
    efforts = [[int(number) for number, _ in EFFORT.findall(attack)] for attack in (new, old)]
    return same[0] == same[1] and all(more >= less for more, less in zip(*efforts, strict=True))


def check_card(card: ModelCard | str) -> ModelCard:
    """Refuse a card, or the text of one, that the Hub would not understand; returns it as read.

    Raises:
        ValueError: The metadata or the results in them cannot be read back, or say that this is no image classifier of
            transformers; the message says which.
    """
    try:
        read = ModelCard(str(card))
    except Exception as error:  # YAML errors of several libraries
        raise ValueError(f"The card's metadata cannot be read: {error}") from error
    for name, expected in (("pipeline_tag", "image-classification"), ("library_name", "transformers")):
        if read.data.get(name) != expected:
            raise ValueError(f"The card's metadata have {name}={read.data.get(name)!r}; expected {expected!r}.")
    if not read.data.get("license"):
        raise ValueError("The card's metadata have no license; expected one such as apache-2.0.")
    for result in read.data.eval_results or []:
        if number(result.metric_value) is None:
            raise ValueError(
                f"The card's result {result.metric_name!r} is {result.metric_value!r}; expected a number."
            )
    if not read.text.strip():
        raise ValueError("The card has no text below its metadata.")
    return read


def is_rendered(text: str) -> bool:
    """Whether a card was rendered by us and may be rendered again."""
    return MARKER in text


def load_report(folder: str | os.PathLike) -> RobustnessReport | None:
    """The report in a folder; None where it has none.

    Raises:
        ValueError: results.json is there but is no report.
    """
    path = Path(folder, RESULTS_NAME)
    return RobustnessReport.load(path) if path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object.")
    return content


def model_name(folder: Path, repo_id: str | None = None) -> str:
    """The repository's name, or the folder's; a folder called "model" is named after the run around it."""
    if repo_id is not None:
        return repo_id.split("/")[-1]
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


# --- metadata --------------------------------------------------------------------------------------------------------


def create_card_data(report: RobustnessReport | None, subject: CardSubject, **metadata: Any) -> ModelCardData:
    """The YAML block: licence, tags, data, base model and the measured results."""
    config, training = subject.config, {} if report is None else report.training
    base_model, dataset_id = training.get("base_model"), training.get("dataset_id")
    given = {name: value for name, value in metadata.items() if value is not None}
    lists = {name: [given[name]] if isinstance(given[name], str) else list(given[name]) for name in LISTS & set(given)}
    tags = [*card_tags(report, config), *lists.pop("tags", [])]
    given.pop("tags", None)  # they are in `tags`, after ours
    fields = {
        "license": training.get("license") or base_license(base_model),
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": list(dict.fromkeys(tags)),  # each once, ours first
        "datasets": [dataset_id] if dataset_id else None,
        "metrics": None if report is None else ["accuracy"],
        "base_model": base_model,
        "base_model_relation": "finetune" if base_model else None,
        "model_name": subject.name,  # ModelCardData takes no eval_results without it
        "eval_results": eval_results(report) or None,
    }
    return ModelCardData(**{**fields, **given, **lists})


def card_tags(report: RobustnessReport | None, config: dict[str, Any]) -> list[str]:
    """Tags to be found by."""
    model = {} if report is None else report.model
    experts = model.get("num_experts") or config.get("robust", config).get("num_experts") or 0
    tags = {
        "hf_dualmoe": True,
        "image-classification": True,
        "adversarial-robustness": True,
        "dual-model": is_dual(report, config),
        "mixture-of-experts": experts > 1,
        "timm": "backbone" in model or "backbone" in config.get("robust", config),
        "custom_code": has_code(report, config),
    }
    return [name for name, fits in tags.items() if fits]


def base_license(base_model: str | None) -> str:
    """Apache-2.0, or the licence that timm names for the weights that the training started from."""
    name = (base_model or "").removeprefix("timm/")
    known = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    return getattr(known, "license", None) or "apache-2.0"


def eval_results(report: RobustnessReport | None) -> list[EvalResult]:
    """The results for the model-index: accuracies in %, each with norm, eps, settings and interval of its attack."""
    if report is None:
        return []
    name = data_name(report)
    shared = {"task_type": "image-classification", "task_name": "Image classification"}
    shared |= {"dataset_type": name, "dataset_name": name, "dataset_split": report.dataset.get("split")}
    shared["dataset_args"] = {"num_images": report.dataset.get("num_images")}
    results = []

    def add(kind: str, title: str, value: float, **args: Any) -> None:
        known = {name: arg for name, arg in args.items() if arg is not None}
        results.append(
            EvalResult(
                **shared, metric_type=kind, metric_name=title, metric_value=round(value, 2), metric_args=known or None
            )
        )

    for key, value in accuracies(report.metrics).items():
        args, kind = {"interval_95": interval(report, key)}, "accuracy"
        if key != "sa":
            args |= {
                **ball(report),
                "attack": attack_settings(report, key),
                "doubted": bool(report.suspicious) or None,
            }
            kind = "robust_accuracy"
        add(kind, metric_title(key), value, **args)
    for point in certified(report):
        args = {name: value for name, value in point.items() if name != "accuracy"}
        add("certified_accuracy", f"certified at radius {point['radius']:g}", point["accuracy"], **args)
    return results


__all__ = [
    "PLOTS",
    "CardSubject",
    "check_card",
    "create_model_card",
    "load_report",
    "refresh_model_card",
    "render_folder",
    "write_model_card",
]
