"""Robustness reports: accuracy on clean and attacked images, of the whole model, its components and along the dial.

Numbers are measured in float32 and eval mode and are written to `results.json` as they come. Images are independent of
each other and all noise is seeded by their numbers, so that several processes find what one does.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..attacks.auto_attack import DTYPES, VERSIONS
from ..attacks.base import check_alphas, check_choice, check_counts, check_eps, device_of, frozen
from ..attacks.pgd import PGD
from ..attacks.precision import full_precision
from ..data.datasets import ImageTensorDataset
from ..models.parts import has_dial
from .environment import (
    check_class_names,
    check_image_shape,
    check_num_images,
    data_digest,
    describe_environment,
    describe_model,
)
from .measurements import Evaluation
from .processes import Processes, open_measurer
from .report import RobustnessReport

if TYPE_CHECKING:
    from accelerate import Accelerator

ALPHAS = (0.0, 0.5, 0.75, 0.9, 1.0)  # both ends: F_S and F_R alone
PARTS = ("components", "dial", "component_attacks", "eps_curve", "worst_case", "autoattack", "sanity")
LEVELS = {
    "quick": ("components", "dial", "sanity"),
    # which takes some 1,900 gradient passes per image
    "standard": tuple(part for part in PARTS if part != "autoattack"),
    "full": PARTS,
}
SANITY = {"quick": {"num_images": 64, "square_queries": 100}}  # what the sanity checks spend, by level
SANITY_DEFAULT = {"num_images": 200, "square_queries": 200}


def evaluate_robustness(
    model: nn.Module,
    dataset: ImageTensorDataset,
    *,
    eps: float = 8 / 255,
    norm: str = "linf",
    steps: int = 20,
    alphas: Sequence[float] = ALPHAS,
    batch_size: int = 256,
    seed: int = 0,
    dataset_name: str = "",
    path: str | os.PathLike | None = None,
    progress: bool = True,
    level: str | Sequence[str] = "quick",
    num_images: int | None = None,
    held_out: ImageTensorDataset | None = None,
    min_sa: float | None = None,
    min_ra: float | None = None,
    worst_case_steps: int | None = None,
    union_restarts: int = 1,
    autoattack_version: str | None = None,
    attack_dtype: str = "fp32",
    sanity_images: int | None = None,
    check_names: bool = True,
    accelerator: "Accelerator | None" = None,
    resume_dir: str | os.PathLike | None = None,
    fresh: bool = False,
) -> RobustnessReport:
    """Measure how accurate a model is, clean and attacked, with its components and along the dial.

    An image counts as robust where it is classified rightly both clean and attacked. A measurement that fails is left
    out and named in `failures`; an image that fails in one counts as wrong there. Every level runs the sanity checks:
    what they doubt is in `suspicious`.

    Args:
        model: Dual model, mixture of experts, or any image classifier that takes [0, 1] images.
        dataset: Test images.
        eps, norm: Radius in [0, 1] pixel units, and the norm that it is measured in: "linf" or "l2".
        steps: PGD steps (step size 2.5 * eps / steps, random start, best iterate kept).
        alphas: Positions of the dial to measure, each in [0, 1] (dual models only).
        batch_size: Images per forward.
        seed: Seed of the attacks and of the choice of `num_images`.
        dataset_name: Name to report.
        path: Where to write the report after every measurement, and beside it the record of what became of each image
            (`outcomes`); None = nowhere.
        progress: Whether to show progress bars.
        level: "quick" (SA and PGD of the model, its components, the dial, small sanity checks), "standard" (adds
            RA-E, RA-R, the adaptive worst case, accuracy against eps, larger checks), "full" (adds AutoAttack), or
            names of `PARTS`. Without a radius, eps = 0, "quick" has nothing to check and leaves the checks out.
        num_images: Use so many images, chosen with the class shares of the whole; None = all.
        held_out: Images of neither training nor test to choose the dial on, by `dial_attack`; None = PGD on `dataset`.
        min_sa, min_ra: Floor in % for the recommended alpha; at most one. See `choose_alpha` for the rule without.
        worst_case_steps: Gradient passes per member of the worst case; None = `steps`.
        union_restarts: Random starts per member of the worst case. A plain network has 2 members where a dual model of
            mixtures has a dozen or more: give it as many restarts where the two are compared.
        autoattack_version: "standard", "few_classes" or "fast"; None = the first that the number of classes allows.
        attack_dtype: Precision in which AutoAttack searches, "fp32" or "bf16"; every success is confirmed in fp32, and
            what survives is attacked again there, see `autoattack`. All other attacks are in fp32.
        sanity_images: Images for the sanity checks; None = 64 at level "quick", else 200.
        check_names: Whether the dataset's class names must be those of the model's `id2label`.
        accelerator: Share the images among its processes, all of which call this function and get the same report;
            None = this process measures alone.
        resume_dir: Folder of finished measurements, which a later call with the same model, images and attack
            settings does not repeat; other settings are refused. None = keep nothing.
        fresh: Start over in a `resume_dir` that holds measurements.

    Returns:
        The report; `seeds["training"]`, `training` and `controls` are left to the caller.

    Raises:
        ValueError: An argument is out of range, dataset and model differ in classes or image shape, the logits are
            NaN, or `resume_dir` belongs to another evaluation.
        RuntimeError: Not even the clean images can be classified.
    """
    floors = {"min_sa": min_sa, "min_ra": min_ra}
    counts = {"batch_size": batch_size, "sanity_images": sanity_images, "worst_case_steps": worst_case_steps}
    parts = check_evaluation(
        model,
        (dataset, held_out),
        eps=eps,
        norm=norm,
        level=level,
        alphas=alphas,
        floors=floors,
        counts={**counts, "union_restarts": union_restarts, "num_images": num_images},
        autoattack_version=autoattack_version,
        attack_dtype=attack_dtype,
        check_names=check_names,
    )
    whole = dataset
    dataset = whole if num_images is None else whole.take(num_images, seed=seed)  # the same images at each call
    attack = PGD(eps=eps, norm=norm, steps=steps, seed=seed)  # seeded: a restart, or more processes, find the same
    with full_precision(), frozen(model):  # TF32 would make numbers depend on the GPU
        run = begin(
            model,
            dataset,
            attack,
            dataset_name=dataset_name,
            path=path,
            batch_size=batch_size,
            progress=progress,
            accelerator=accelerator,
            resume_dir=resume_dir,
            fresh=fresh,
        )
        if num_images is not None:
            run.report.dataset["taken_from"] = data_digest(whole)
        measure(
            run,
            parts,
            alphas=alphas,
            held_out=held_out,
            floors=floors,
            union_steps=worst_case_steps or steps,
            union_restarts=union_restarts,
            autoattack_version=autoattack_version,
            attack_dtype=attack_dtype,
            sanity=sanity_effort(level, sanity_images),
        )
    return run.report


def begin(
    model: nn.Module,
    dataset: ImageTensorDataset,
    attack: PGD,
    *,
    dataset_name: str,
    path: str | os.PathLike | None,
    batch_size: int,
    progress: bool,
    accelerator: "Accelerator | None",
    resume_dir: str | os.PathLike | None,
    fresh: bool,
) -> Evaluation:
    """An evaluation that has measured nothing yet; arguments as in `evaluate_robustness`."""
    processes = Processes(accelerator)
    report = RobustnessReport(
        model=describe_model(model),
        dataset={
            "name": dataset_name,
            "num_images": len(dataset),
            "class_names": dataset.class_names,
            "digest": data_digest(dataset),
        },
        threat={"norm": attack.norm, "eps": float(attack.eps), "attacks": {f"ra_pgd{attack.steps}": repr(attack)}},
        seeds={"evaluation": attack.seed},
        environment={**describe_environment(device_of(model)), "processes": processes.count},
    )
    measurer = open_measurer(
        model,
        dataset,
        processes,
        settings={"attack": repr(attack)},
        batch_size=batch_size,
        progress=progress,
        resume_dir=resume_dir,
        fresh=fresh,
    )
    return Evaluation(model, report, attack, measurer, path)


def measure(
    run: Evaluation,
    parts: Sequence[str],
    *,
    alphas: Sequence[float],
    held_out: ImageTensorDataset | None,
    floors: Mapping[str, float | None],
    union_steps: int,
    union_restarts: int,
    autoattack_version: str | None,
    attack_dtype: str,
    sanity: Mapping[str, int],
) -> None:
    """Measure the whole model, then `parts` in the order of `PARTS`; arguments as in `evaluate_robustness`."""
    run.whole()  # first: all other accuracies need to know which images are right when clean
    if "components" in parts:
        run.components()
    run.routing()  # was seen on the way
    if "dial" in parts:
        run.dial(alphas, held_out, **floors)
    if "component_attacks" in parts:
        run.component_attacks()
    if "eps_curve" in parts:
        run.eps_curve()
    if "worst_case" in parts:
        run.worst_case(union_steps, union_restarts)
    if "autoattack" in parts:
        run.autoattack(autoattack_version, attack_dtype)
    if "sanity" in parts:
        run.sanity(**sanity)
    run.finish()  # last: the worst case is over all attacks that were measured


def check_evaluation(
    model: nn.Module,
    datasets: tuple[ImageTensorDataset, ImageTensorDataset | None],
    *,
    eps: float,
    norm: str,
    level: str | Sequence[str],
    alphas: Sequence[float] = ALPHAS,
    floors: dict[str, float | None] | None = None,
    counts: dict[str, int | None] | None = None,
    autoattack_version: str | None = None,
    attack_dtype: str = "fp32",
    check_names: bool = True,
) -> Sequence[str]:
    """Check what `evaluate_robustness` is asked for, before anything is measured; returns the parts to measure.

    Args:
        model, eps, norm, level, alphas, autoattack_version, attack_dtype, check_names: As there.
        datasets: Test images, and held-out images or None.
        floors, counts: Its arguments `min_sa` and `min_ra`, and those that count something, by name; None = not given.

    Raises:
        ValueError: An argument is out of range, or does not fit the model or the images.
    """
    parts = parts_of(level, eps)
    check_eps(eps, norm, datasets[0].images.shape[1:])
    if eps == 0 and {"eps_curve", "sanity"} & set(parts):
        raise ValueError("eps=0 leaves nothing to check; give eps > 0, or level='quick'.")
    has_sweep = has_dial(model) and "dial" in parts
    if has_sweep:  # alphas have a default, which a model without a dial must not trip over
        check_alphas(alphas)
    check_floors(floors or {}, has_sweep)
    if autoattack_version is not None:
        check_choice("autoattack_version", autoattack_version, VERSIONS)
    check_choice("attack_dtype", attack_dtype, DTYPES)
    if attack_dtype != "fp32" and "autoattack" not in parts:
        raise ValueError(f"attack_dtype={attack_dtype!r} is for AutoAttack; level={level!r} leaves it out.")
    check_counts(counts or {})
    check_num_images((counts or {}).get("num_images"), len(datasets[0]))
    check_model(model, datasets, check_names)
    return parts


def parts_of(level: str | Sequence[str], eps: float) -> Sequence[str]:
    """The parts of a level, or the given names of parts; ValueError where there is no such level or part."""
    if isinstance(level, str):
        if level not in LEVELS:
            raise ValueError(f"level={level!r} is not one of {', '.join(map(repr, LEVELS))}, nor a list of parts.")
        # eps = 0 asks level quick for clean numbers, which no sanity check is about
        return [part for part in LEVELS[level] if not (level == "quick" and eps == 0 and part == "sanity")]
    if unknown := [part for part in level if part not in PARTS]:
        raise ValueError(f"level has unknown parts {', '.join(map(repr, unknown))}; parts are {', '.join(PARTS)}.")
    return level


def sanity_effort(level: str | Sequence[str], num_images: int | None) -> dict[str, int]:
    """Budget of the sanity checks of a level, or of given parts."""
    effort = SANITY.get(level, SANITY_DEFAULT) if isinstance(level, str) else SANITY_DEFAULT
    return effort if num_images is None else {**effort, "num_images": num_images}


def check_model(model: nn.Module, datasets: Sequence[ImageTensorDataset | None], check_names: bool) -> None:
    """Raise a ValueError where the datasets' classes or shape are not the model's; warn where it is in train mode."""
    for images in datasets:
        if images is not None:
            check_class_names(model, images.class_names, check_names)
            check_image_shape(model, images.images)
    if any(module.training for module in model.modules()):
        # evaluate_robustness's caller
        warnings.warn("The model is in train mode; it is evaluated in eval mode.", stacklevel=4)


def check_floors(floors: Mapping[str, float | None], has_sweep: bool) -> None:
    """Raise a ValueError unless there is at most one floor of "min_sa" and "min_ra", in %, and a dial to choose."""
    given = {name: floor for name, floor in floors.items() if floor is not None}
    for name, floor in given.items():
        if not isinstance(floor, (int, float)) or not 0 <= floor <= 100:
            raise ValueError(f"{name}={floor!r} must be an accuracy in %, in [0, 100].")
        if not has_sweep:
            raise ValueError(f"{name}={floor!r} chooses the dial of a dual model; there is none to measure here.")
    if len(given) > 1:
        raise ValueError(f"min_sa={floors['min_sa']!r} and min_ra={floors['min_ra']!r} were both given; give one.")


__all__ = ["ALPHAS", "LEVELS", "PARTS", "RobustnessReport", "check_evaluation", "evaluate_robustness"]
