"""The report of a robustness evaluation: a dataclass, its JSON and its table."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .environment import write_text


@dataclass
class RobustnessReport:
    """Everything measured about one model on one dataset; the content of `results.json`.

    Args:
        model: Kind, architecture, number of parameters; and what makes two models one function: a digest of the
            `weights`, and of a dual model `alpha`, `mixing` and logit maps.
        dataset: Name, number of images, class names and a `digest` of images and labels; where the images were chosen
            from more, `taken_from` is the digest of all.
        threat: `norm`, `eps` (in [0, 1] pixel units) and the attacks with their settings.
        metrics: `sa` and `ra_<attack>` in %, of the whole model, with 95 % Wilson `intervals`; `ra_worst_case` is
            pointwise over all attacks on the whole model, and `worst_case` has its members' own accuracies;
            `components` has `sa` and `ra_pgd<steps>` for F_S and F_R; `expert_load` the mean weight of each expert in
            the outputs, in %, on clean and attacked images (with top-1 routing, the share of images that it gets), and
            `route_flip_rate` the share of first choices that differ between them, in %; `eps_curve` one {"eps",
            "ra_pgd<steps>"} per radius; `autoattack` what stands after each of its attacks, in %, and after a search
            in half precision `autoattack_sources` how many images each precision broke (see `AutoAttackResult`).
        alpha_sweep: One {"alpha", "sa", "ra_<attack>"} per position of the dial, each attacked at that position.
        controls: Results of other models for comparison, by name.
        sanity: Name of a check -> {"passed", "message"}.
        seeds: Seeds of the evaluation (and of the training, where known).
        environment: Library versions, hardware, processes, wall time in seconds (of all starts, as far as measurements
            were kept).
        training: Settings of the training, where known.
        suspicious: Reasons to doubt the numbers; empty where all checks that ran have passed.
        alpha_choice: Recommended `alpha`, its `sa` and `ra` in %, the `rule`, and the images it was `chosen_on`.
        failures: Name of a measurement -> why it is missing, or which images failed and count as wrong.
        cost: Measurement -> mean `forward` and `gradient` passes per image, and `seconds`; their sum is `total`.
        outcomes: Name of the file beside the report that says what became of each image; "" = there is none.
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
    suspicious: list[str] = field(default_factory=list)
    alpha_choice: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    outcomes: str = ""

    def save(self, path: str | os.PathLike) -> None:
        """Write JSON, replacing the file in one step: a reader or a crash never meets half a report."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "RobustnessReport":
        """Read what `save` wrote.

        Raises:
            ValueError: The file is no report, or has a field that this version does not know.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a report of hf_dualmoe: {error}") from error

    def table(self) -> str:
        """A table for the terminal: whole model with its intervals, components and dial; "-" = not measured.

        Below it stands in which precision AutoAttack searched, where that was not fp32.
        """
        attacks = [name for name in self.metrics if name.startswith("ra_")]
        titles = [name.removeprefix("ra_").replace("_", " ").upper() for name in attacks]
        rows = [["", "SA %", *(f"RA {title} %" for title in titles)]]

        def add(title: str, values: dict[str, float], text: Callable[[Any], str] = "{:.2f}".format) -> None:
            rows.append([title, *(text(values[name]) if name in values else "-" for name in ("sa", *attacks))])

        alpha = f" (alpha = {self.model['alpha']:g})" if "alpha" in self.model else ""
        add(f"{self.model['kind']}{alpha}", self.metrics)
        add("  95 % interval", self.metrics.get("intervals", {}), lambda pair: f"{pair[0]:.1f} to {pair[1]:.1f}")
        for name, values in self.metrics.get("components", {}).items():
            add(f"  {name} alone", values)
        for values in self.alpha_sweep:
            add(f"  dial at alpha = {values['alpha']:g}", values)
        precision = self.autoattack_precision()
        return "\n".join([aligned(rows), *([precision] if precision else [])])

    def autoattack_precision(self) -> str:
        """In which precision AutoAttack searched and what each found, in a sentence; empty where it was fp32."""
        found = self.metrics.get("autoattack_sources")
        if not found:
            return ""
        return (
            f"AutoAttack searched in half precision. Images broken: {found['confirmed']} there, confirmed in fp32; "
            f"{found['again_in_fp32']} by the same attacks again in fp32; {found['survivors_in_fp32']} survivors by "
            f"the last attack, in fp32. Not counted: {found['not_confirmed']} that fell in half precision alone."
        )

    def notes(self) -> list[str]:
        """Lines to read with the table: the recommended alpha, the checks, what failed, the cost."""
        lines = []
        if choice := self.alpha_choice:
            lines.append(
                f"Recommended alpha = {choice['alpha']:g}: {choice['rule']} on {choice['chosen_on']} "
                f"(SA {choice['sa']:.2f} %, RA {choice['ra']:.2f} %)."
            )
        passed = sum(check["passed"] for check in self.sanity.values())
        lines.append(f"Sanity checks: {passed} of {len(self.sanity)} passed." if self.sanity else "No sanity checks.")
        lines += [f"SUSPICIOUS: {reason}" for reason in self.suspicious]
        lines += [f"FAILED: {name}: {reason}" for name, reason in self.failures.items()]
        lines += [f"MEMORY: {name}: {what}" for name, what in self.environment.get("smaller_batches", {}).items()]
        if total := self.cost.get("total"):
            passes = f"{total['forward']:.0f} forward and {total['gradient']:.0f} gradient passes per image"
            lines.append(f"Cost: {passes}, {total['seconds']:.1f} s.")
        return lines


def same_images(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the `dataset` of two reports is the same images: by digest, or by name and number where one has none."""
    keys = ["digest"] if first.get("digest") and second.get("digest") else ["name", "num_images"]
    return all(first.get(key) == second.get(key) for key in keys)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table for the terminal: a line below the first row, all columns but one to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


__all__ = ["RobustnessReport", "aligned", "same_images"]
