"""Robustness reports: accuracy on clean and attacked images, of the whole model, its components and along the dial.

Numbers are measured in float32 and eval mode and are written to `results.json` as they come.
"""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attack_primitives import Classifier, frozen, logits_of
from .attacks import PGD
from .data import ImageTensorDataset, to_unit_range

PACKAGES = ("torch", "timm", "transformers", "accelerate", "datasets", "huggingface_hub", "hf_dualmoe")
ALPHAS = (0.0, 0.5, 0.75, 0.9, 1.0)


@dataclass
class RobustnessReport:
    """Everything measured about one model on one dataset; the content of `results.json`.

    Args:
        model: Kind, architecture, number of parameters.
        dataset: Name, split, number of images.
        threat: `norm`, `eps` (in [0, 1] pixel units) and the attacks with their settings.
        metrics: `sa` and `ra_<attack>` in %, of the whole model; `components` has the same for F_S and F_R;
            `expert_load` in % per expert on clean and attacked images, and `route_flip_rate` in %.
        alpha_sweep: One {"alpha", "sa", "ra_<attack>"} per position of the dial, each attacked at that position.
        controls: Results of other models for comparison, by name.
        sanity: Checks by name.
        seeds: Seeds of the evaluation (and of the training, where known).
        environment: Library versions, hardware, wall time in seconds.
    """

    model: dict[str, Any]
    dataset: dict[str, Any]
    threat: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    alpha_sweep: list[dict[str, float]] = field(default_factory=list)
    controls: dict[str, Any] = field(default_factory=dict)
    sanity: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, replacing the file in one step: a reader or a crash never meets half a report."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RobustnessReport":
        """Read what `save` wrote."""
        return cls(**json.loads(Path(path).read_text()))

    def table(self) -> str:
        """A table for the terminal: whole model, components and dial."""
        attacks = [name for name in self.metrics if name.startswith("ra_")]
        rows = [["", "SA %", *(f"RA {name.removeprefix('ra_').upper()} %" for name in attacks)]]

        def add(title: str, values: dict[str, float]) -> None:
            rows.append([title, *(f"{values[name]:.2f}" for name in ("sa", *attacks))])

        alpha = f" (alpha = {self.model['alpha']:g})" if "alpha" in self.model else ""
        add(f"{self.model['kind']}{alpha}", self.metrics)
        for name, values in self.metrics.get("components", {}).items():
            add(f"  {name} alone", values)
        for values in self.alpha_sweep:
            add(f"  dial at alpha = {values['alpha']:g}", values)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join(lines)


@torch.no_grad()
def correct_mask(
    classifier: Classifier,
    dataset: ImageTensorDataset,
    *,
    attack: PGD | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    description: str | None = None,
) -> Tensor:
    """Which images are classified rightly, clean or under an attack.

    Args:
        classifier: Callable from images (B, C, H, W) in [0, 1] to logits; a module is held in eval mode.
        dataset: Images and labels.
        attack: Attack to apply first; a seeded one gives the same images for any batch size.
        batch_size: Images per forward.
        device: Where the classifier is.
        description: Label of the progress bar, which shows the running accuracy; None = no bar.

    Returns:
        (N,) bool on the CPU, in dataset order.
    """
    correct = torch.zeros(len(dataset), dtype=torch.bool)
    bar = tqdm(range(0, len(dataset), batch_size), desc=description, disable=description is None, leave=False)
    with frozen(classifier):
        for start in bar:
            ids = torch.arange(start, min(start + batch_size, len(dataset)))
            batch = dataset.__getitems__(ids)
            images, labels = to_unit_range(batch["pixel_values"].to(device)), batch["labels"].to(device)
            if attack is not None:
                images = attack(classifier, images, labels, ids=ids)
            correct[ids] = (logits_of(classifier, images).argmax(dim=1) == labels).cpu()
            bar.set_postfix_str(f"{percent(correct[: ids[-1] + 1]):.2f} %")
    return correct


def percent(mask: Tensor) -> float:
    """Share of true entries, in %."""
    return 100 * float(mask.float().mean())


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
) -> RobustnessReport:
    """Measure SA and RA under PGD of a model, of its components and along the dial.

    RA counts an image as robust where it is classified rightly both clean and attacked.

    Args:
        model: Dual model, mixture of experts, or any image classifier that takes [0, 1] images.
        dataset: Test images.
        eps: Radius in [0, 1] pixel units.
        norm: "linf" or "l2".
        steps: PGD steps (step size 2.5 * eps / steps, random start, best iterate kept).
        alphas: Positions of the dial to measure (dual models only).
        batch_size: Images per forward.
        seed: Seed of the attack.
        dataset_name: Name to report.
        path: Where to write the report after every measurement; None = nowhere.
        progress: Whether to show progress bars.

    Returns:
        The report; `seeds["training"]`, `training` and `controls` are left to the caller.
    """
    start_time = time.perf_counter()
    attack = PGD(eps=eps, norm=norm, steps=steps, seed=seed)
    key = f"ra_pgd{steps}"
    device = next(model.parameters()).device
    report = RobustnessReport(
        model=describe_model(model),
        dataset={"name": dataset_name, "num_images": len(dataset), "class_names": dataset.class_names},
        threat={"norm": norm, "eps": float(eps), "attacks": {key: repr(attack)}},
        seeds={"evaluation": seed},
        environment=describe_environment(device),
    )

    def measure(classifier: Classifier, title: str) -> dict[str, float]:
        settings = {"batch_size": batch_size, "device": device}
        clean = correct_mask(classifier, dataset, description=f"{title} clean" if progress else None, **settings)
        attacked = correct_mask(
            classifier, dataset, attack=attack, description=f"{title} PGD-{steps}" if progress else None, **settings
        )
        return {"sa": percent(clean), key: percent(clean & attacked)}

    def write() -> None:
        report.environment["wall_time_s"] = round(time.perf_counter() - start_time, 2)
        if path is not None:
            report.save(path)

    report.metrics = measure(model, "whole model")
    write()
    if hasattr(model, "standard"):
        components = {name: measure(getattr(model, name), name) for name in ("standard", "robust")}
        report.metrics["components"] = components
        write()
        known = {0.0: components["standard"], 1.0: components["robust"], model.config.alpha: report.metrics}
        for alpha in alphas:
            values = known.get(alpha) or measure(DialedModel(model, alpha), f"alpha = {alpha:g}")
            report.alpha_sweep.append({"alpha": alpha, "sa": values["sa"], key: values[key]})
            write()
    moe = getattr(model, "robust", model)
    if hasattr(moe, "route"):
        report.metrics |= routing_metrics(moe, dataset, attack, batch_size=batch_size, device=device)
        write()
    return report


class DialedModel(nn.Module):
    """A dual model with its dial held at `alpha`, as a plain classifier images -> logits (B, C)."""

    def __init__(self, model: nn.Module, alpha: float):
        super().__init__()
        self.model, self.alpha = model, alpha

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, alpha=self.alpha).logits


@torch.no_grad()
def routing_metrics(
    moe: nn.Module, dataset: ImageTensorDataset, attack: PGD, *, batch_size: int, device: str | torch.device
) -> dict[str, Any]:
    """Share of images per expert (first choice) clean and attacked, and share whose first choice changes, all in %."""
    routes = {"clean": [], "attacked": []}
    with frozen(moe):
        for start in range(0, len(dataset), batch_size):
            ids = torch.arange(start, min(start + batch_size, len(dataset)))
            batch = dataset.__getitems__(ids)
            images, labels = to_unit_range(batch["pixel_values"].to(device)), batch["labels"].to(device)
            routes["clean"].append(moe.route(images).argmax(dim=1).cpu())
            routes["attacked"].append(moe.route(attack(moe, images, labels, ids=ids)).argmax(dim=1).cpu())
    clean, attacked = torch.cat(routes["clean"]), torch.cat(routes["attacked"])
    load = {
        name: [
            round(100 * share, 2) for share in (torch.bincount(r, minlength=moe.config.num_experts) / len(r)).tolist()
        ]
        for name, r in (("clean", clean), ("attacked", attacked))
    }
    return {"expert_load": load, "route_flip_rate": percent(clean != attacked)}


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Kind, architecture, dial and number of parameters of a model, for a report."""
    config = getattr(model, "config", None)
    description = {
        "kind": {"dual_moe": "dual model", "robust_moe": "mixture of experts"}.get(
            getattr(config, "model_type", None), type(model).__name__
        ),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if hasattr(config, "alpha"):
        description |= {"alpha": config.alpha, "mixing": config.mixing}
    robust = getattr(config, "robust", config)
    fields = ("backbone", "backbone_kwargs", "stem", "width", "image_size", "num_channels", "num_experts")
    fields += ("router_top_k", "router", "shared_stages")
    return description | {name: getattr(robust, name) for name in fields if hasattr(robust, name)}


def _cpu_name() -> str:
    """Model name of the processor where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((ln.split(":", 1)[1].strip() for ln in lines if ln.startswith("model name")), platform.machine())


def describe_environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Python and library versions, and the hardware that `device` is on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    device = torch.device(device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "python": platform.python_version(),
        "packages": versions,
        "device": device.type,
        "hardware": f"{hardware}, {os.cpu_count()} CPU cores",
    }


__all__ = ["DialedModel", "RobustnessReport", "correct_mask", "evaluate_robustness", "routing_metrics"]
