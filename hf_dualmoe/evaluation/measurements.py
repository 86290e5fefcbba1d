"""The measurements that a robustness report is made of, one method each."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.adaptive_union import UNION, worst_case
from ..attacks.auto_attack import autoattack, remove_state
from ..attacks.components import attack_experts, attack_router
from ..attacks.flags import square_flag
from ..attacks.members import member_names
from ..attacks.pgd import PGD
from ..data.datasets import ImageTensorDataset
from ..models.parts import answering, has_dial, has_experts, is_dual, mixture_of
from .calibration import Component
from .dial import DialedModel, choose_alpha, dial_attack
from .environment import data_digest
from .memory import free_memory, is_out_of_memory
from .metrics import wilson_interval
from .processes import Found, Measurer, classify, is_right, percent
from .report import RobustnessReport
from .sanity import Check, run_sanity_checks, suspicious, worst_case_check

EPS_FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of eps, for accuracy against eps
ENDS = {0.0: "standard", 1.0: "robust"}  # of the dial


class Evaluation(Measurer):
    """One model on one dataset: measures, and writes each number into the report."""

    def __init__(
        self, model: nn.Module, report: RobustnessReport, attack: PGD, path: str | os.PathLike | None, **measurer: Any
    ):
        super().__init__(**measurer)
        self.model, self.report, self.attack, self.path = model, report, attack, path
        report.failures, report.cost = self.failures, self.cost
        self.key, self.started = f"ra_pgd{attack.steps}", time.perf_counter()
        self.ball = {"eps": attack.eps, "norm": attack.norm}
        self.dual = has_dial(model)
        self.counted = model.robust if is_dual(model) else model  # runs once whenever the whole model does
        self.at = f" at alpha={model.config.alpha!r}" if self.dual else ""
        self.standing: Tensor | None = None  # (N,) bool: right when clean and under all attacks on the whole model
        self.own: dict[str, float] = {}  # RA in % under each of them alone
        self.routed: list[Found] = []  # of the mixture: first choices and loads, clean and attacked

    @property
    def moe(self) -> nn.Module | None:
        """The mixture whose routes are measured; None where there is none."""
        return mixture_of(self.model) if has_experts(answering(self.counted)) else None

    def write(self) -> None:
        """Bring `results.json` up to date."""
        costs = [cost for name, cost in self.cost.items() if name != "total"]
        if costs:
            self.cost["total"] = {name: round(sum(cost[name] for cost in costs), 3) for name in costs[0]}
        if self.smaller_batches:
            self.report.environment["smaller_batches"] = self.smaller_batches
        self.report.environment["wall_time_s"] = round(time.perf_counter() - self.started, 2)
        if self.path is not None and self.processes.is_main:
            self.report.save(self.path)

    def score(self, classifier: nn.Module, title: str, counted: nn.Module, **options) -> dict[str, Any]:
        """SA and RA of a classifier in %, without what could not be measured, and the masks (N,) behind them."""
        clean = self.measure(f"{title} clean", classify(classifier), counted, **options)
        attacked = self.measure(
            f"{title} PGD-{self.attack.steps}", classify(classifier, self.attack), counted, **options
        )
        masks = {} if clean is None else {"sa": clean.tensors["right"]}
        if clean is not None and attacked is not None:
            masks[self.key] = clean.tensors["right"] & attacked.tensors["right"]
            if classifier is self.counted and self.moe is not None:
                self.routed = [clean, attacked]
        return masks

    def add_whole(self, name: str, robust: Tensor) -> None:
        """Report the RA under an attack on the whole model; `robust` (N,) bool counts only where clean is right."""
        robust = robust & self.clean
        self.standing = robust if self.standing is None else self.standing & robust
        self.report.metrics[name] = self.own[name.removeprefix("ra_")] = percent(robust)
        self.add_interval(name, robust)

    def add_interval(self, name: str, mask: Tensor) -> None:
        """Report the 95 % interval of the share of true entries of mask (N,)."""
        interval = wilson_interval(int(mask.sum()), len(mask))
        self.report.metrics.setdefault("intervals", {})[name] = [round(end, 4) for end in interval]

    def whole(self) -> None:
        """SA and RA of the whole model."""
        masks = self.score(self.model, "whole model" + self.at, self.counted)
        if "sa" not in masks:
            raise RuntimeError(f"the model cannot classify the clean images: {next(iter(self.failures.values()))}")
        self.clean = masks["sa"]
        self.report.metrics["sa"] = percent(self.clean)
        self.add_interval("sa", self.clean)
        if self.key in masks:
            self.add_whole(self.key, masks[self.key])
        self.write()

    def components(self) -> None:
        """SA and RA of F_S and F_R alone."""
        for name in ("standard", "robust") if self.dual else ():
            part = getattr(self.model, name)
            classifier = part if has_experts(part) else Component(self.model, name)  # one of ours normalises itself
            values = {key: percent(mask) for key, mask in self.score(classifier, name, part).items()}
            self.report.metrics.setdefault("components", {})[name] = values
            self.write()

    def dial(self, alphas: Sequence[float], held_out: ImageTensorDataset | None, floors: dict[str, Any]) -> None:
        """SA and RA along the dial, each attacked there, and the recommended alpha; nothing is measured twice."""
        if not self.dual:
            return
        metrics = self.report.metrics
        known = {alpha: metrics.get("components", {}).get(name) for alpha, name in ENDS.items()}
        known[self.model.config.alpha] = {name: metrics[name] for name in ("sa", self.key) if name in metrics}
        for alpha in alphas:
            values = known.get(alpha) or self.dialed(alpha, f"alpha={alpha!r}")
            if self.key in values:
                self.report.alpha_sweep.append({"alpha": alpha, "sa": values["sa"], self.key: values[self.key]})
            self.write()
        self.choose(held_out, alphas, floors)

    def dialed(self, alpha: float, title: str, **options) -> dict[str, float]:
        """SA and RA in % at one position of the dial."""
        masks = self.score(DialedModel(self.model, alpha), title, self.counted, **options)
        return {key: percent(mask) for key, mask in masks.items()}

    def choose(self, held_out: ImageTensorDataset | None, alphas: Sequence[float], floors: dict) -> None:
        """Recommend a position of the dial."""
        sweep, images = self.report.alpha_sweep, f"the {len(self.dataset)} test images themselves (optimistic)"
        if held_out is not None:
            images, title = f"{len(held_out)} held-out images", f"held out {data_digest(held_out)}"
            points = [self.held_out_point(alpha, held_out, f"{title} alpha={alpha!r}") for alpha in alphas]
            sweep = [point for point in points if point]
        else:
            sweep = [{**point, "ra": point[self.key]} for point in sweep]
        try:
            choice = choose_alpha(sweep, **floors)
        except ValueError as error:
            self.failures["recommended alpha"] = str(error)
        else:
            self.report.alpha_choice = {**asdict(choice), "chosen_on": images}
        self.write()

    def held_out_point(self, alpha: float, held_out: ImageTensorDataset, title: str) -> dict[str, float]:
        """SA and RA in % of held-out images under the dial's own attack; empty where they could not be measured."""
        given = {name: getattr(self.attack, name) for name in ("eps", "norm", "steps", "seed")}
        attack, dialed = dial_attack(self.model.config.num_labels, **given), DialedModel(self.model, alpha)
        clean = self.measure(f"{title} clean", classify(dialed), self.counted, dataset=held_out)
        attacked = self.measure(f"{title} dial attack", classify(dialed, attack), self.counted, dataset=held_out)
        if clean is None or attacked is None:
            return {}
        right = clean.tensors["right"]
        return {"alpha": alpha, "sa": percent(right), "ra": percent(right & attacked.tensors["right"])}

    def routing(self) -> None:
        """Weight of each expert in the outputs, clean and attacked, and share of first choices that change, in %."""
        if not self.routed:
            return
        experts = range(self.moe.config.num_experts)
        sums = [[found.sums[f"load_{i}"] for i in experts] for found in self.routed]
        clean, attacked = ([round(100 * load / sum(loads), 2) for load in loads] for loads in sums)
        first, then = (found.tensors["route"] for found in self.routed)
        seen = (first >= 0) & (then >= 0)  # -1: the image failed
        flips = percent(first[seen] != then[seen])
        self.report.metrics |= {"expert_load": {"clean": clean, "attacked": attacked}, "route_flip_rate": flips}
        self.write()

    def component_attacks(self) -> None:
        """RA-E and RA-R: attacks on the experts alone and on the router alone, judged by the whole model."""
        if self.moe is None:
            return
        attack = self.attack
        attacks: dict[str, tuple[Callable, nn.Module]] = {
            "expert": (lambda *batch, ids: attack_experts(self.model, *batch, attack=attack, ids=ids), self.counted),
            "router": (
                lambda *batch, ids: attack_router(
                    self.model, *batch, **self.ball, steps=attack.steps, seed=attack.seed, ids=ids
                ),
                self.moe.router,  # passes of the router alone
            ),
        }
        for part, (strike, counted) in attacks.items():
            work = judged(self.model, strike)
            found = self.measure(f"{part} attack PGD-{attack.steps}{self.at}", work, counted)
            if found is not None:
                self.add_whole(f"ra_{part}_{self.key.removeprefix('ra_')}", found.tensors["right"])
            self.write()

    def eps_curve(self) -> None:
        """RA of the whole model at several radii."""
        largest = 1.0 if self.attack.norm == "linf" else float("inf")
        points = [{"eps": 0.0, self.key: self.report.metrics["sa"]}]
        for eps in dict.fromkeys(min(factor * self.attack.eps, largest) for factor in EPS_FACTORS):
            if eps == self.attack.eps and self.key in self.report.metrics:
                points.append({"eps": eps, self.key: self.report.metrics[self.key]})
                continue
            work, name = classify(self.model, replace(self.attack, eps=eps)), f"PGD-{self.attack.steps} eps={eps:.6g}"
            found = self.measure(name + self.at, work, self.counted)
            if found is not None:
                points.append({"eps": eps, self.key: percent(found.tensors["right"] & self.clean)})
        self.report.metrics["eps_curve"] = points
        self.write()

    def worst_case(self, steps: int, restarts: int = 1) -> None:
        """The adaptive union of `worst_case`, every member a measurement of its own: a restart goes on behind it."""
        many = "" if restarts == 1 else f" {restarts} restarts"
        title = f"worst case {steps} steps{many}{self.at}"
        names = member_names(self.model, len(self.dataset.class_names))
        found: dict[str, Found] = {}
        for name in names:
            part = self.measure(f"{title} {name}", self.member(name, steps, restarts), self.counted)
            if part is None:  # without one of its members it is no union
                self.failures[title] = self.failures.pop(f"{title} {name}")
                break
            found[name] = part
        self.add_cost(title, [f"{title} {name}" for name in found])
        if len(found) == len(names):
            right = {name: part.tensors["right"] for name, part in found.items()}
            self.add_whole("ra_adaptive_union", torch.stack([*right.values()]).all(dim=0))
            self.own |= {name: percent(mask & self.clean) for name, mask in right.items()}
            runs = f"{steps} APGD steps and {restarts} restart{'s' * (restarts > 1)} per member"
            self.report.threat["attacks"]["worst_case"] = f"{UNION} of {len(names)} members, {runs}"
        self.write()

    def member(self, name: str, steps: int, restarts: int) -> Callable[..., dict[str, Any]]:
        """Work that runs one member of the adaptive union."""

        def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Any]:
            settings = {**self.ball, "steps": steps, "restarts": restarts, "seed": self.attack.seed}
            result = worst_case(
                self.model, images, labels, ids=ids, members=[name], batch_size=len(images), **settings
            )
            passes = {kind: count * len(ids) for kind, count in result.passes.items()}
            return {"right": result.robust, **passes}

        return work

    def add_cost(self, title: str, parts: list[str]) -> None:
        """Report the cost of several measurements as that of one."""
        costs = [self.cost.pop(part) for part in parts if part in self.cost]
        if costs:
            self.cost[title] = {kind: sum(cost[kind] for cost in costs) for kind in costs[0]}

    def autoattack(self, version: str | None) -> None:
        """The AutoAttack union, with its flags among the sanity checks."""
        count = len(self.dataset.class_names)
        version = version or ("standard" if count >= 4 else "few_classes")
        name, shard = f"AutoAttack {version}{self.at}", f"part {self.processes.rank} of {self.processes.count}"
        state = None if self.store.folder is None else self.store.path(f"{name} {shard}")

        def work(images: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Any]:
            settings = {**self.ball, "version": version, "seed": self.attack.seed, "progress": self.progress}
            result = None
            while result is None:
                try:
                    result = autoattack(
                        self.model, images, labels, ids=ids, state_file=state, batch_size=self.batch_size, **settings
                    )
                except RuntimeError as error:
                    if self.batch_size == 1 or not is_out_of_memory(error):
                        raise
                    self.use_smaller_batches(self.batch_size // 2)
                if result is None:  # goes on from the state file, once the failed attempt holds no memory
                    free_memory()
            stages = {f"stage {stage}": round(share * len(ids)) for stage, share in result.accuracy.items()}
            passes = {kind: rows * len(ids) for kind, rows in result.passes.items()}
            flags = {flag: [found.raised, found.message] for flag, found in result.flags.items()}
            return {"right": result.robust, **stages, **passes, "flags": json.dumps(flags), "name": result.name}

        found = self.measure(name, work, self.counted, at_once=True)
        if found is not None:
            if state is not None:
                remove_state(state)
            self.add_whole("ra_autoattack", found.tensors["right"])
            self.report.threat["attacks"]["autoattack"] = found.texts["name"][0]
            self.add_flags(found)
        self.write()

    def add_flags(self, found: Found) -> None:
        """Join the flags that AutoAttack raised on the processes' images."""
        stages = {n.removeprefix("stage "): v for n, v in found.sums.items() if n.startswith("stage ")}
        shares = {name: value / len(self.dataset) for name, value in stages.items()}
        self.report.metrics["autoattack"] = {name: 100 * share for name, share in shares.items()}
        by_process = [json.loads(text) for text in found.texts["flags"]]
        square = square_flag(shares, len(self.dataset))
        for name in by_process[0]:
            raised, message = max((flags[name] for flags in by_process), key=lambda flag: flag[0])
            if name == "square_stronger":
                raised, message = square.raised, square.message
            self.add_checks({f"autoattack {name}": Check(not raised, message)})

    def add_checks(self, checks: dict[str, Check]) -> None:
        """Report sanity checks, and what failed as a reason to doubt."""
        self.report.sanity |= {n: {"passed": check.passed, "message": check.message} for n, check in checks.items()}
        self.report.suspicious += suspicious(checks)

    def finish(self) -> None:
        """Report the pointwise worst case over all attacks on the whole model where there are several."""
        if self.standing is None or len(self.own) < 2:
            self.write()
            return
        robust = percent(self.standing)
        self.report.metrics["ra_worst_case"] = robust
        self.report.metrics["worst_case"] = {"accuracy": robust, "members": self.own}
        self.add_interval("ra_worst_case", self.standing)
        self.add_checks({"worst_case": worst_case_check({**self.own, "union": robust})})
        self.write()

    def sanity(self, num_images: int, **effort: int) -> None:
        """The sanity checks, on a sample and by the main process alone; `effort` as in `run_sanity_checks`."""
        spent = "".join(f" {key}={value}" for key, value in effort.items())
        name = f"sanity checks {num_images} images{spent}{self.at}"

        def checked() -> Found:
            if (found := self.store.load(name)) is not None:
                return found
            settings = {**self.ball, "steps": self.attack.steps, "seed": self.attack.seed, "num_images": num_images}
            settings |= {**effort, "batch_size": self.batch_size, "device": self.device, "progress": self.progress}
            checks = run_sanity_checks(self.model, self.dataset, **settings)
            texts = {n: [json.dumps([check.passed, check.message])] for n, check in checks.items()}
            found = Found(torch.zeros(0, dtype=torch.int64), texts=texts)
            self.store.save(name, found)
            return found

        try:
            found = self.processes.from_main(checked)
        except Exception as error:
            self.failures[name] = f"{type(error).__name__}: {error}"
        else:
            self.add_checks({n: Check(*json.loads(texts[0])) for n, texts in found.texts.items()})
        self.write()


def judged(model: nn.Module, strike: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Work that attacks with `strike` (images, labels, ids=) and shows the result to the whole model."""
    return lambda images, labels, ids: {"right": is_right(model, strike(images, labels, ids=ids), labels)}


__all__ = ["DialedModel", "Evaluation"]
