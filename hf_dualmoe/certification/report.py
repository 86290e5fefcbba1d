"""Certified accuracy of a model on a dataset, as table, JSON and plot."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attacks.base import check_alphas, check_counts, device_of, frozen, percent
from ..attacks.precision import check_no_autocast, full_precision
from ..data.datasets import ImageTensorDataset
from ..evaluation.environment import (
    check_class_names,
    check_image_shape,
    check_num_images,
    describe_environment,
    describe_model,
    write_text,
)
from ..evaluation.metrics import wilson_interval
from ..evaluation.processes import Measurer, Processes, open_measurer
from ..evaluation.report import aligned
from ..evaluation.store import Found
from ..evaluation.work import Work
from ..models.parts import at_alpha, has_dial, is_dual, mixes_weights, part_of
from .certifier import Certificates, Certifier
from .lipschitz import check_eval_mode
from .operator_norms import check_norm
from .smoothing import Votes, certify_votes, check_confidence, check_sigma, sample_votes

if TYPE_CHECKING:
    from accelerate import Accelerator

ALPHAS = (0.6, 0.75, 0.9, 1.0)  # above 1/2, where F_R's certificates carry over
CURVE_POINTS = 101


@dataclass
class CertificationReport:
    """Everything certified about one model on one dataset; the content of `certificates.json`.

    Args:
        model: Kind, architecture, number of parameters.
        dataset: Name, number of images, class names.
        norm: "l2", "linf" or "l1"; radii are in [0, 1] pixel units.
        radii: Radii of the table.
        entries: For each certified model, in order: `name`, `alpha` (None without a dial), `kind` ("proof" or
            "smoothing"), `confidence` per image, `sa` in % (None for a smoothed dual model), `certified` in % at each
            radius with 95 % Wilson `intervals`, `median_radius` of the images that are right and certified, the number
            of images per `status` and per `rule`, the `reason` why it is not applicable, and `curve`: radius and
            certified accuracy in %.
        settings: Of the smoothing.
        seeds: Seed of the noise and of the choice of images.
        environment: Library versions, hardware, processes, wall time in seconds.
        failures: Name of a measurement -> why it is missing, or which images failed and count as not certified.
    """

    model: dict[str, Any]
    dataset: dict[str, Any]
    norm: str
    radii: list[float]
    entries: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, replacing the file in one step."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "CertificationReport":
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> str:
        """Certified accuracy in % per model and radius; "-" where there is no certificate."""
        rows = [["certified accuracy, %", "SA %", *(f"{self.norm} {radius:.4g}" for radius in self.radii)]]
        for entry in self.entries:
            values = [entry["sa"], *(entry["certified"] or [None] * len(self.radii))]
            rows.append([entry["name"], *("-" if value is None else f"{value:.2f}" for value in values)])
        return aligned(rows)

    def notes(self) -> list[str]:
        """Lines to read with the table: what kind of certificate each is, what is not applicable, what failed."""
        lines = []
        if any(entry["kind"] == "proof" and entry["certified"] for entry in self.entries):
            lines.append("Deterministic certificates hold for the model itself.")
        smoothed = [entry for entry in self.entries if entry["kind"] == "smoothing" and entry["certified"]]
        if smoothed:
            confidence = 100 * smoothed[0]["confidence"]
            lines.append(
                f"Smoothing certifies the vote over noisy copies, each image with {confidence:g} % confidence."
            )
        lines += [f"NOT APPLICABLE: {e['name']}: {e['reason']}" for e in self.entries if e["reason"]]
        return lines + [f"FAILED: {name}: {reason}" for name, reason in self.failures.items()]


class Certification:
    """Certifies one model on one dataset and writes each entry into the report.

    Args:
        model: The model, frozen.
        report: Where the entries go.
        measurer: Takes the measurements.
        path: Where to write the report; None = nowhere.
    """

    def __init__(
        self, model: nn.Module, report: CertificationReport, measurer: Measurer, path: str | os.PathLike | None
    ):
        self.model, self.report, self.measurer, self.path = model, report, measurer, path
        self.dataset, self.started = measurer.dataset, time.perf_counter()
        report.failures = measurer.failures

    def write(self) -> None:
        """Bring the report's file up to date."""
        elapsed = time.perf_counter() - self.started
        self.report.environment["wall_time_s"] = round(self.measurer.earlier + elapsed, 2)
        if self.path is not None and self.measurer.processes.is_main:
            self.report.save(self.path)

    def all_proofs(self, alphas: Sequence[float]) -> None:
        """Deterministic certificates of the model; of a dual model those of its parts and along the dial."""
        if not has_dial(self.model):
            self.proofs("model", self.model, (None,))
            return
        for title, part in (("F_S alone", "standard"), ("F_R alone", "robust")):
            if isinstance(getattr(self.model, f"normalize_{part}"), nn.Identity):  # else it takes other images
                self.proofs(title, getattr(self.model, part), (None,))
        for alpha in alphas if mixes_weights(self.model) else ():  # each position is a network of its own
            self.proofs(f"merged, alpha = {alpha:g}", at_alpha(self.model, alpha), (None,))
        if is_dual(self.model):
            self.proofs("dual", self.model, alphas)

    def proofs(self, name: str, model: nn.Module, alphas: Sequence[float | None]) -> None:
        """Deterministic certificates of a model, at positions of the dial (None: it has none)."""
        shape = tuple(self.dataset.images.shape[1:])
        certifier = Certifier(model, self.report.norm, shape)  # constants once for all alphas
        for alpha in alphas:
            title = name if alpha is None else f"{name}, alpha = {alpha:g}"
            found = self.measurer.measure(f"{title} {self.report.norm}", certify_batch(certifier, alpha), model)
            if found is not None:
                self.add(title, found, {"alpha": alpha, "kind": "proof", "confidence": 1.0})

    def smoothing(
        self, sigma: float, alphas: Sequence[float], *, n0: int, n: int, confidence: float, seed: int
    ) -> None:
        """Smoothing certificates at one level of noise; all alphas share the votes."""
        dual = is_dual(self.model)
        classifier = part_of(self.model, "robust") if dual else self.model

        def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Tensor]:
            batch_size = self.measurer.batch_size
            votes = sample_votes(
                classifier, images, sigma=sigma, n0=n0, n=n, batch_size=batch_size, seed=seed, ids=ids
            )
            return {"right": votes.selected == labels.cpu(), "selected": votes.selected, "counts": votes.counts}

        counted = self.model.robust if dual else self.model
        voter = f"merged at alpha = {self.model.config.alpha!r}" if mixes_weights(self.model) else "model"
        title = f"{'F_R' if dual else voter} smoothed, sigma = {sigma:g}"
        found = self.measurer.measure(f"{title}, n0 = {n0}, n = {n}, seed = {seed}", work, counted)
        if found is None:
            return
        failed = found.failed | (found.tensors["counts"] < 0)
        votes = Votes(found.tensors["selected"], found.tensors["counts"].clamp_min(0), n, sigma)
        for alpha in alphas if dual else (None,):
            if alpha is not None and alpha <= 0.5:  # no theorem: F_S can outvote F_R
                continue
            certificates = certify_votes(votes, alpha=alpha or 1.0, confidence=confidence)
            tensors = {
                "radius": certificates.radius.masked_fill(failed, math.nan),
                "prediction": certificates.prediction,
                "right": certificates.prediction == self.dataset.labels,  # false where the vote abstains: -1
            }
            rules = {rule: certificates.rule.count(rule) for rule in set(certificates.rule) if rule}
            entry = {"alpha": alpha, "kind": "smoothing", "confidence": confidence}
            name = title if alpha in (None, 1.0) else f"dual over {title}, alpha = {alpha:g}"
            part = Found(found.rows, tensors=tensors, failed=failed, sums=rules)
            # F_S did not vote: no SA of the mixture
            sa = percent(found.tensors["right"]) if alpha in (None, 1.0) else None
            self.add(name, part, entry, sa=sa)

    def add(self, name: str, found: Found, entry: dict[str, Any], sa: float | None = math.nan) -> None:
        """Report what was certified; `sa` NaN = that of the predictions."""
        right = found.tensors["right"] & ~found.failed
        radius = found.tensors["radius"].masked_fill(found.failed, math.nan)
        reason = next(iter(found.texts.get("reason", [])), "")
        certified = ~radius.isnan()
        status = {"certified": int(certified.sum()), "failed": int(found.failed.sum())}
        status["not applicable" if reason else "abstain"] = len(radius) - sum(status.values())
        counts = [int((right & (radius >= r)).sum()) for r in self.report.radii]
        good = radius[right & certified]
        self.report.entries.append(
            {
                "name": name,
                **entry,
                "sa": percent(right) if sa is not None and math.isnan(sa) else sa,
                "certified": None if reason else [100 * count / len(radius) for count in counts],
                "intervals": None if reason else [wilson_interval(count, len(radius)) for count in counts],
                "median_radius": float(good.median()) if len(good) else None,
                "status": status,
                "rule": {rule: int(count) for rule, count in found.sums.items() if rule not in NOT_RULES},
                "reason": reason,
                "curve": None if reason else curve_of(right, radius),
            }
        )
        self.write()


NOT_RULES = ("forward", "gradient", "seconds")


def certify_batch(certifier: Certifier, alpha: float | None) -> Work:
    """Work that certifies a batch."""

    def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Any]:
        found: Certificates = certifier(images, alpha)
        rules = {rule: found.rule.count(rule) for rule in set(found.rule) if rule}
        reason = {"reason": found.reason} if found.reason else {}
        right = found.prediction == labels.cpu()
        return {"right": right, "prediction": found.prediction, "radius": found.radius, **rules, **reason}

    return work


def curve_of(right: Tensor, radius: Tensor) -> dict[str, list[float]]:
    """Certified accuracy in % at evenly spaced radii, up to the largest radius of an image that is right."""
    good = radius[right & ~radius.isnan()]
    largest = float(good.max()) if len(good) else 0.0
    radii = torch.linspace(0, largest, CURVE_POINTS, dtype=torch.float64)
    shares = (good[None] >= radii[:, None]).sum(dim=1) * (100 / len(radius))
    return {"radius": [round(r, 6) for r in radii.tolist()], "accuracy": [round(s, 4) for s in shares.tolist()]}


def certify_dataset(
    model: nn.Module,
    dataset: ImageTensorDataset,
    *,
    norm: str = "l2",
    radii: Sequence[float] = (0.1, 0.25, 0.5),
    alphas: Sequence[float] = ALPHAS,
    sigmas: Sequence[float] = (),
    n0: int = 100,
    n: int = 1000,
    confidence: float = 0.999,
    batch_size: int = 256,
    seed: int = 0,
    num_images: int | None = None,
    dataset_name: str = "",
    check_names: bool = True,
    path: str | os.PathLike | None = None,
    progress: bool = True,
    accelerator: "Accelerator | None" = None,
    resume_dir: str | os.PathLike | None = None,
    fresh: bool = False,
) -> CertificationReport:
    """Certified accuracy of a model, of the parts of a dual model and along its dial, and of smoothed models.

    Args:
        model: Dual model, mixture of experts, or any network that `lipschitz_bound` takes, in eval mode. For smoothing
            any image classifier.
        dataset: Test images.
        norm: "l2", "linf" or "l1".
        radii: Radii of the table, > 0, in [0, 1] pixel units.
        alphas: Positions of the dial of a dual model, in [0, 1].
        sigmas: Levels of noise of smoothing, > 0, in pixel units; needs norm="l2". Empty = no smoothing.
        n0, n, confidence: As in `smoothed_certificates`.
        batch_size: Images (of smoothing: noisy copies) per forward.
        seed: Seed of the noise and of the choice of `num_images`.
        num_images: Use so many images, chosen with the class shares of the whole; None = all.
        dataset_name: Name to report.
        check_names: Whether the dataset's class names must be those of the model's `id2label`.
        path: Where to write the report after every measurement; None = nowhere.
        progress: Whether to show progress bars.
        accelerator: Share the images among its processes; None = this process alone.
        resume_dir: Folder of finished measurements that a later call does not repeat; None = keep nothing.
        fresh: Start over in a `resume_dir` that holds measurements.

    Raises:
        ValueError: An argument is out of range, the model is in train mode, autocast is on, dataset and model have
            other classes or other image shapes, or `resume_dir` belongs to other settings.
    """
    check_certification(norm, radii, alphas, sigmas, confidence)
    check_counts({"n0": n0, "n": n, "batch_size": batch_size, "num_images": num_images})
    check_num_images(num_images, len(dataset))
    check_class_names(model, dataset.class_names, check_names)
    check_image_shape(model, dataset.images)
    check_eval_mode(model)
    check_no_autocast()
    dataset = dataset if num_images is None else dataset.take(num_images, seed=seed)
    processes = Processes(accelerator)
    report = CertificationReport(
        model=describe_model(model),
        dataset={"name": dataset_name, "num_images": len(dataset), "class_names": dataset.class_names},
        norm=norm,
        radii=[float(radius) for radius in radii],
        settings={"sigmas": list(sigmas), "n0": n0, "n": n, "confidence": confidence} if sigmas else {},
        seeds={"certification": seed},
        environment={**describe_environment(device_of(model)), "processes": processes.count},
    )
    with frozen(model), full_precision():
        measurer = open_measurer(
            model,
            dataset,
            processes,
            settings={},
            batch_size=batch_size,
            progress=progress,
            resume_dir=resume_dir,
            fresh=fresh,
        )
        run = Certification(model, report, measurer, path)
        run.all_proofs(alphas)
        for sigma in sigmas:
            positions = [*dict.fromkeys((1.0, *alphas))]  # 1.0: F_R alone is always reported
            run.smoothing(sigma, positions, n0=n0, n=n, confidence=confidence, seed=seed)
        run.write()
    return report


def check_certification(
    norm: str, radii: Sequence[float], alphas: Sequence[float], sigmas: Sequence[float], confidence: float
) -> None:
    """Raise a ValueError that names the first setting that is out of range."""
    check_norm(norm)
    check_confidence(confidence)
    if len(radii) == 0 or not all(0 < radius < math.inf for radius in radii):
        raise ValueError(f"radii={list(radii)!r} must hold at least one value, all > 0.")
    check_alphas(alphas)
    for sigma in sigmas:
        check_sigma(sigma)
    if sigmas and norm != "l2":
        raise ValueError(f"sigmas={list(sigmas)!r} with norm={norm!r}: smoothing certifies in L2 only.")


def plot_certificates(report: CertificationReport, path: str | os.PathLike) -> None:
    """Draw certified accuracy against the radius, one line per model; dashed for smoothing.

    Args:
        report: Report with at least one applicable entry.
        path: Image file to write; its ending chooses the format.

    Raises:
        ValueError: The report has nothing to draw.
    """
    from ..evaluation.plots import new_axes  # matplotlib only where something is drawn

    drawn = [entry for entry in report.entries if entry["curve"]]
    if not drawn:
        raise ValueError("This report has no certificates to draw.")
    import matplotlib

    figure, axes = new_axes(7.2, 4.6)
    colours = matplotlib.colormaps["viridis"]
    duals = [entry["alpha"] for entry in drawn if entry["name"].startswith("dual") and entry["alpha"] is not None]
    for entry in drawn:
        alone = not entry["name"].startswith("dual")
        style = "--" if entry["kind"] == "smoothing" else "-"
        colour = {"F_S alone": "#d1495b", "F_R alone": "#222222", "model": "#3b6fb6"}.get(entry["name"])
        if not alone:
            rank = sorted(set(duals)).index(entry["alpha"])
            colour = colours(0.1 + 0.8 * rank / max(1, len(set(duals)) - 1))
        radii, shares = (entry["curve"][name] for name in ("radius", "accuracy"))
        # wide and pale: at alpha = 1 the dual model's line lies on it
        look = {"color": colour, "linewidth": 4, "alpha": 0.35} if entry["name"] == "F_R alone" else {"color": colour}
        # beyond it nothing is certified
        axes.plot([*radii, radii[-1]], [*shares, 0], style, label=entry["name"], **{"linewidth": 1.5, **look})
    for radius in report.radii:
        axes.axvline(radius, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"{ {'l2': 'L2', 'linf': 'L∞', 'l1': 'L1'}[report.norm] } radius, pixel units in [0, 1]")
    axes.set_ylabel("certified accuracy, %")
    axes.set_title(f"Certified accuracy on {report.dataset['name']} ({report.dataset['num_images']} images)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path)


__all__ = ["CertificationReport", "certify_dataset", "plot_certificates"]
