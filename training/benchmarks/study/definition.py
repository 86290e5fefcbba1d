"""What a study is: its file read and checked, the order of its runs, and what the result of an arm depends on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_dualmoe.models.configuration_dualmoe import MIXINGS

STUDIES = Path(__file__).parent / "studies"
KEYS = {"dataset_name", "passes", "seeds", "settings", "evaluation", "arms"}
PARTS = ("standard", "robust", "init_from")  # of an arm: other arms whose trained models it needs
NOTES = {"about", "extra"}  # keys of an arm that its result does not depend on
JOINING = {"standard", "robust", "mixing", "calibrate"}  # keys of an arm that joins two models
ARM_KEYS = {*NOTES, *JOINING, "settings", "passes", "evaluation", *PARTS}
SHAPE = ("backbone", "stem", "width", "num_experts", "shared_stages", "router")  # settings that weights depend on


@dataclass(frozen=True)
class Run:
    """One arm with one seed; `parts` are runs whose models it joins or starts from."""

    arm: str
    seed: int
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


# --- reading and checking --------------------------------------------------------------------------------------------


def read_study(path: Path) -> dict[str, Any]:
    """Read and check a study.

    Raises:
        ValueError: The file does not exist, a key is unknown or missing, or an arm refers to one that is not there.
    """
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in STUDIES.glob("*.yaml")))
        raise ValueError(f"study={str(path)!r} is neither a file nor one of {known}.")
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    if wrong := sorted(set(study) ^ KEYS):
        raise ValueError(f"study {path.name}: unknown or missing keys {', '.join(wrong)}.")
    for name in study["arms"]:
        try:
            check_arm(study, name)
        except ValueError as error:
            raise ValueError(f"study {path.name}, arm {name}: {error}") from error
    return study


def settings_of(study: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings of an arm as the study states them."""
    return {**study["settings"], **study["arms"][name].get("settings", {})}


def check_arm(study: dict[str, Any], name: str) -> None:
    """Refuse an arm that cannot be trained, before anything is.

    Raises:
        ValueError: A key is unknown or does not go with another, or an arm that is referred to is missing or unfit.
    """
    arm = study["arms"][name]
    if unknown := sorted(set(arm) - ARM_KEYS):
        raise ValueError(f"unknown keys {', '.join(unknown)}.")
    for key in PARTS:
        if key in arm and arm[key] not in study["arms"]:
            raise ValueError(f"{key}={arm[key]!r} is not an arm.")
    for key in ("extra", "calibrate"):
        if not isinstance(arm.get(key, False), bool):
            raise ValueError(f"{key}={arm[key]!r} must be true or false.")
    check_joining(study, arm)
    check_no_circle(study["arms"], name)
    check_budget(study, name)


def check_joining(study: dict[str, Any], arm: dict[str, Any]) -> None:
    """Raise a ValueError unless the keys of an arm that joins two models fit each other, and these models."""
    if ("standard" in arm) != ("robust" in arm):
        raise ValueError("standard and robust go together.")
    if "standard" not in arm:
        if given := sorted(JOINING & set(arm)):
            raise ValueError(f"{', '.join(given)} given: only an arm that joins models (standard, robust) has them.")
        return
    if wrong := sorted(set(arm) - NOTES - JOINING - {"evaluation"}):
        raise ValueError(f"it joins trained models, so that {', '.join(wrong)} have no meaning.")
    mixing = arm.get("mixing", MIXINGS[0])
    if mixing not in MIXINGS:
        raise ValueError(f"mixing={mixing!r} is not one of {', '.join(map(repr, MIXINGS))}.")
    if arm.get("calibrate") and mixing != "probs":
        raise ValueError(f"calibrate goes with mixing='probs', not {mixing!r}.")
    if mixing == "weights":
        standard, robust = (settings_of(study, arm[part]) for part in ("standard", "robust"))
        if wrong := [key for key in (*SHAPE, "router_top_k") if standard.get(key) != robust.get(key)]:
            raise ValueError(f"mixing='weights' needs two models of one shape; they differ in {', '.join(wrong)}.")


def check_no_circle(arms: dict[str, Any], name: str, above: tuple[str, ...] = ()) -> None:
    """Raise a ValueError if an arm refers to itself, at last."""
    if name in above:
        raise ValueError(f"{' -> '.join((*above, name))} is a circle.")
    for key in PARTS:
        if arms[name].get(key) in arms:
            check_no_circle(arms, arms[name][key], (*above, name))


def check_budget(study: dict[str, Any], name: str) -> None:
    """Raise a ValueError unless the budget of an arm is > 0 and init_from a fitting model that leaves some of it."""
    arm = study["arms"][name]
    if not arm.get("passes", 1) > 0:
        raise ValueError(f"passes={arm['passes']!r} must be > 0.")
    if "init_from" not in arm:
        return
    source, entry = arm["init_from"], study["arms"][arm["init_from"]]
    settings, own = settings_of(study, source), settings_of(study, name)
    fits = settings.get("num_experts") == 1 or all(own.get(key) == settings.get(key) for key in SHAPE)
    if "standard" in entry or settings.get("method") == "jtdmoe" or not fits:
        raise ValueError(f"init_from={source!r} must be one network (num_experts: 1), or a mixture of the same shape.")
    passes, before = (study["arms"][each].get("passes", study["passes"]) for each in (name, source))
    if not before < passes:
        raise ValueError(f"init_from={source!r} costs {before} of {passes} passes: give it fewer passes of its own.")


# --- runs ------------------------------------------------------------------------------------------------------------


def usual_arms(study: dict[str, Any]) -> list[str]:
    """The arms that run where none are named."""
    return [name for name, arm in study["arms"].items() if not arm.get("extra")]


def plan(study: dict[str, Any], arms: list[str], seeds: list[int]) -> list[Run]:
    """The runs, seed by seed, so that a study that is stopped early has whole seeds.

    Raises:
        ValueError: An arm is unknown, or needs models of arms that are not asked for.
    """
    runs = []
    for seed in seeds:
        for name in arms:
            if name not in study["arms"]:
                raise ValueError(f"arms: {name!r} is not one of {', '.join(study['arms'])}.")
            parts = parts_of(study, name)
            if missing := sorted(set(parts) - set(arms)):
                raise ValueError(f"arms: {name!r} needs the models of {', '.join(missing)}: ask for them too.")
            runs.append(Run(name, seed, tuple(f"{part}-seed{seed}" for part in parts)))
    return sorted(runs, key=lambda run: (run.seed, depth(study, run.arm)))  # else a run could wait for one after it


def parts_of(study: dict[str, Any], arm: str) -> list[str]:
    """Arms whose trained models an arm needs."""
    return [study["arms"][arm][key] for key in PARTS if key in study["arms"][arm]]


def depth(study: dict[str, Any], arm: str) -> int:
    """How many arms must be trained one after the other before an arm can be."""
    return max((1 + depth(study, part) for part in parts_of(study, arm)), default=0)


def definition(study: dict[str, Any], arm: str) -> dict[str, Any] | None:
    """All that the result of an arm depends on, that of the arms it refers to included; None if it is not there."""
    if arm not in study["arms"]:
        return None
    entry = {key: value for key, value in study["arms"][arm].items() if key not in NOTES}
    shared = {key: study[key] for key in ("dataset_name", "passes", "settings", "evaluation")}
    return {**shared, "arm": entry, "others": [definition(study, entry[key]) for key in PARTS if key in entry]}
