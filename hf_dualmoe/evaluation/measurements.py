"""The measurements of a robustness report, one method each."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import nn

from ..attacks.adaptive_union import UNION
from ..attacks.auto_attack import remove_state
from ..attacks.base import percent
from ..attacks.flags import square_flag
from ..attacks.members import member_names
from ..attacks.pgd import PGD
from ..data.datasets import ImageTensorDataset
from ..models.parts import answering, has_dial, has_experts, is_dual, mixture_of, part_of
from .dial import DialedModel, choose_alpha, dial_attack
from .environment import data_digest
from .metrics import wilson_interval
from .outcomes import Outcomes, outcomes_path
from .processes import Measurer
from .report import RobustnessReport
from .sanity import Check, run_sanity_checks, suspicious, worst_case_check
from .store import Found, Outcome
from .work import autoattack_union, classify, on_experts, on_router, union_member

EPS_FACTORS = (0.25, 0.5, 1.0, 1.5, 2.0)  # of eps, for accuracy against eps
ENDS = {0.0: "standard", 1.0: "robust"}  # of the dial


class Evaluation:
    """One model on one dataset: measures, and writes each number into the report and each outcome into the record.

    Args:
        model: The model, frozen.
        report: Where the numbers go.
        attack: PGD as the report describes it.
        measurer: Takes the measurements.
        path: Where to write the report, and beside it the record; None = nowhere.
    """

    def __init__(
        self,
        model: nn.Module,
        report: RobustnessReport,
        attack: PGD,
        measurer: Measurer,
        path: str | os.PathLike | None,
    ):
        self.model, self.report, self.attack, self.measurer, self.path = model, report, attack, measurer, path
        self.dataset, self.processes = measurer.dataset, measurer.processes
        report.failures, report.cost = measurer.failures, measurer.cost
        self.outcomes = Outcomes(self.dataset.rows, self.dataset.labels)
        self.key, self.started = f"ra_pgd{attack.steps}", time.perf_counter()
        self.dual = has_dial(model)
        self.counted = model.robust if is_dual(model) else model  # runs once whenever the whole model does
        self.at = f" at alpha={model.config.alpha!r}" if self.dual else ""
        self.standing: Outcome | None = None  # right when clean and under all attacks on the whole model
        self.own: dict[str, float] = {}  # RA in % under each of them alone
        self.routed: list[Found] = []  # of the mixture: first choices and loads, clean and attacked
        self.positions: dict[float, dict[str, Outcome]] = {}  # of the dial, that were measured

    @property
    def moe(self) -> nn.Module | None:
        """The mixture whose routes are measured; None where there is none."""
        return mixture_of(self.model) if has_experts(answering(self.counted)) else None

    def write(self) -> None:
        """Bring `results.json` and the record beside it up to date."""
        costs = [cost for name, cost in self.report.cost.items() if name != "total"]
        if costs:
            self.report.cost["total"] = {name: round(sum(cost[name] for cost in costs), 3) for name in costs[0]}
        if self.measurer.smaller_batches:
            self.report.environment["smaller_batches"] = self.measurer.smaller_batches
        elapsed = time.perf_counter() - self.started
        self.report.environment["wall_time_s"] = round(self.measurer.earlier + elapsed, 2)
        if self.path is not None and self.processes.is_main:
            record = outcomes_path(self.path)
            self.outcomes.save(record)
            self.report.outcomes = record.name
            self.report.save(self.path)

    def score(self, classifier: nn.Module, title: str, counted: nn.Module) -> dict[str, Outcome]:
        """Measure which images a classifier gets right, clean ("sa") and attacked too; leave out what fails."""
        pgd = f"{title} PGD-{self.attack.steps}"
        clean = self.measurer.measure(f"{title} clean", classify(classifier), counted)
        attacked = self.measurer.measure(pgd, classify(classifier, self.attack), counted)
        found = {} if clean is None else {"sa": clean.outcome}
        if clean is not None and attacked is not None:
            found[self.key] = clean.outcome & attacked.outcome
            if classifier is self.counted and self.moe is not None:
                self.routed = [clean, attacked]
        return found

    def record(self, name: str, outcome: Outcome) -> float:
        """Add a column to the record; returns its accuracy in %."""
        self.outcomes.add(name, outcome)
        return percent(outcome.right)

    def add_whole(self, name: str, attacked: Outcome) -> None:
        """Report the RA under an attack on the whole model; it counts only where clean is right."""
        robust = attacked & self.clean
        self.standing = robust if self.standing is None else self.standing & robust
        self.report.metrics[name] = self.own[name.removeprefix("ra_")] = self.record(name, robust)
        self.add_interval(name, robust)

    def add_interval(self, name: str, outcome: Outcome) -> None:
        """Report the 95 % interval of the share of images that are right."""
        interval = wilson_interval(int(outcome.right.sum()), len(outcome.right))
        self.report.metrics.setdefault("intervals", {})[name] = [round(end, 4) for end in interval]

    def whole(self) -> None:
        """SA and RA of the whole model."""
        found = self.score(self.model, "whole model" + self.at, self.counted)
        if "sa" not in found:
            raise RuntimeError(
                f"the model cannot classify the clean images: {next(iter(self.report.failures.values()))}"
            )
        self.clean = found["sa"]
        self.report.metrics["sa"] = self.record("sa", self.clean)
        self.add_interval("sa", self.clean)
        self.pgd = found.get(self.key)
        if self.pgd is not None:
            self.add_whole(self.key, self.pgd)
        if self.dual:
            self.positions[self.model.config.alpha] = found
        self.write()

    def components(self) -> None:
        """SA and RA of F_S and F_R alone."""
        for alpha, name in ENDS.items() if self.dual else ():
            found = self.score(part_of(self.model, name), name, getattr(self.model, name))
            values = {key: self.record(f"components/{name}/{key}", outcome) for key, outcome in found.items()}
            self.report.metrics.setdefault("components", {})[name] = values
            self.positions.setdefault(alpha, found)  # the ends of the dial are the components: measured once
            self.write()

    def dial(
        self,
        alphas: Sequence[float],
        held_out: ImageTensorDataset | None,
        min_sa: float | None = None,
        min_ra: float | None = None,
    ) -> None:
        """SA and RA along the dial, each attacked there, and the recommended alpha; nothing is measured twice."""
        if not self.dual:
            return
        for alpha in alphas:
            if not (found := self.positions.get(alpha)):
                found = self.score(DialedModel(self.model, alpha), f"alpha={alpha!r}", self.counted)
            if self.key in found:
                place = f"alpha_sweep/{alpha}"
                values = {key: self.record(f"{place}/{key}", outcome) for key, outcome in found.items()}
                self.report.alpha_sweep.append({"alpha": alpha, **values})
            self.write()
        # under the name that choose_alpha reads
        sweep = [{**point, "ra": point[self.key]} for point in self.report.alpha_sweep]
        images = f"the {len(self.dataset)} test images themselves (optimistic)"
        if held_out is not None:
            points = [self.held_out_point(alpha, held_out) for alpha in alphas]
            sweep, images = [point for point in points if point], f"{len(held_out)} held-out images"
        try:
            choice = choose_alpha(sweep, min_sa=min_sa, min_ra=min_ra)
        except ValueError as error:
            self.report.failures["recommended alpha"] = str(error)  # a floor out of reach costs no other number
        else:
            self.report.alpha_choice = {**asdict(choice), "chosen_on": images}
        self.write()

    def held_out_point(self, alpha: float, held_out: ImageTensorDataset) -> dict[str, float]:
        """SA and RA in % of held-out images under the dial's own attack; empty where they could not be measured."""
        title, dialed = f"held out {data_digest(held_out)} alpha={alpha!r}", DialedModel(self.model, alpha)
        attack = dial_attack(
            self.model.config.num_labels,
            eps=self.attack.eps,
            norm=self.attack.norm,
            steps=self.attack.steps,
            seed=self.attack.seed,
        )
        clean = self.measurer.measure(f"{title} clean", classify(dialed), self.counted, dataset=held_out)
        attacked = self.measurer.measure(
            f"{title} dial attack", classify(dialed, attack), self.counted, dataset=held_out
        )
        if clean is None or attacked is None:
            return {}
        robust = clean.outcome & attacked.outcome
        return {"alpha": alpha, "sa": percent(clean.outcome.right), "ra": percent(robust.right)}

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
        attacks = {
            "expert": (on_experts(self.model, self.attack), self.counted),
            "router": (on_router(self.model, self.attack), self.moe.router),  # passes of the router alone
        }
        for part, (work, counted) in attacks.items():
            found = self.measurer.measure(f"{part} attack PGD-{self.attack.steps}{self.at}", work, counted)
            if found is not None:
                self.add_whole(f"ra_{part}_{self.key.removeprefix('ra_')}", found.outcome)
            self.write()

    def eps_curve(self) -> None:
        """RA of the whole model at several radii."""
        largest = 1.0 if self.attack.norm == "linf" else float("inf")  # check_eps refuses more
        # cut off, some are equal
        radii = dict.fromkeys(min(factor * self.attack.eps, largest) for factor in EPS_FACTORS)
        # a ball of radius 0 is the clean image
        outcomes = {0.0: self.clean, **{eps: self.robust_at(eps) for eps in radii}}
        self.report.metrics["eps_curve"] = [
            {"eps": eps, self.key: self.record(f"eps_curve/{eps}/{self.key}", outcome)}
            for eps, outcome in outcomes.items()
            if outcome is not None
        ]
        self.write()

    def robust_at(self, eps: float) -> Outcome | None:
        """Measure which images are right, clean and under PGD, at a radius; None where that fails."""
        if eps == self.attack.eps and self.pgd is not None:
            return self.pgd
        name = f"PGD-{self.attack.steps} eps={eps:.6g}{self.at}"
        found = self.measurer.measure(name, classify(self.model, replace(self.attack, eps=eps)), self.counted)
        return None if found is None else found.outcome & self.clean

    def worst_case(self, steps: int, restarts: int = 1) -> None:
        """The adaptive union of `worst_case`, every member a measurement of its own: a restart goes on behind it."""
        many = "" if restarts == 1 else f" {restarts} restarts"
        title = f"worst case {steps} steps{many}{self.at}"
        names = member_names(self.model, len(self.dataset.class_names))
        found: dict[str, Outcome] = {}
        for name in names:
            work = union_member(self.model, self.attack, name, steps, restarts)
            part = self.measurer.measure(f"{title} {name}", work, self.counted)
            if part is None:  # without one of its members it is no union
                # under the name of the whole
                self.report.failures[title] = self.report.failures.pop(f"{title} {name}")
                break
            found[name] = part.outcome
        self.add_cost(title, [f"{title} {name}" for name in found])
        if len(found) == len(names):
            union = found[names[0]]
            for outcome in found.values():
                union = union & outcome
            self.add_whole("ra_adaptive_union", union)
            self.own |= {
                name: self.record(f"worst_case/{name}", outcome & self.clean) for name, outcome in found.items()
            }
            runs = f"{steps} APGD steps and {restarts} restart{'s' * (restarts > 1)} per member"
            self.report.threat["attacks"]["worst_case"] = f"{UNION} of {len(names)} members, {runs}"
        self.write()

    def add_cost(self, title: str, parts: list[str]) -> None:
        """Report the cost of several measurements as that of one."""
        costs = [self.report.cost.pop(part) for part in parts if part in self.report.cost]
        if costs:
            self.report.cost[title] = {kind: sum(cost[kind] for cost in costs) for kind in costs[0]}

    def autoattack(self, version: str | None, attack_dtype: str = "fp32") -> None:
        """The AutoAttack union, with its flags among the sanity checks."""
        version = version or ("standard" if len(self.dataset.class_names) >= 4 else "few_classes")
        name = f"AutoAttack {version}{'' if attack_dtype == 'fp32' else f' searched in {attack_dtype}'}{self.at}"
        # each has other images
        shard, store = f"part {self.processes.rank} of {self.processes.count}", self.measurer.store
        state = None if store.folder is None else store.path(f"{name} {shard}")
        work = autoattack_union(self.measurer, self.model, self.attack, version, attack_dtype, state)
        found = self.measurer.measure(name, work, self.counted, at_once=True)
        if found is not None:
            if state is not None:
                remove_state(state)  # the measurement itself is stored by now
            self.add_autoattack(found)
        self.write()

    def add_autoattack(self, found: Found) -> None:
        """Report what AutoAttack found on the images of all processes, and join the flags that it raised on them."""
        about = [json.loads(text) for text in found.texts["about"]]
        attacks, broken_by = about[0]["attacks"], found.tensors["broken_by"]
        self.outcomes.add_broken_by(broken_by, attacks)
        stands = {name: (broken_by < 0) | (broken_by > number) for number, name in enumerate(attacks)}
        self.report.metrics["autoattack"] = {name: percent(mask) for name, mask in stands.items()}
        self.add_whole("ra_autoattack", found.outcome)
        self.report.threat["attacks"]["autoattack"] = about[0]["name"]
        sources = {
            name.removeprefix("source "): int(n) for name, n in found.sums.items() if name.startswith("source ")
        }
        if sources:
            self.report.metrics["autoattack_sources"] = sources
        shares = {name: percent(mask) / 100 for name, mask in stands.items()}
        for name in about[0]["flags"]:
            # raised in one process
            raised, message = max((part["flags"][name] for part in about), key=lambda flag: flag[0])
            if name == "square_stronger":
                # a share of all images: those of one process say less
                square = square_flag(shares, len(self.dataset))
                raised, message = square.raised, square.message
            self.add_checks({f"autoattack {name}": Check(not raised, message)})

    def add_checks(self, checks: dict[str, Check]) -> None:
        """Report sanity checks, and what failed as a reason to doubt."""
        self.report.sanity |= {n: {"passed": check.passed, "message": check.message} for n, check in checks.items()}
        self.report.suspicious += suspicious(checks)

    def finish(self) -> None:
        """Report the pointwise worst case over all attacks on the whole model where there are several."""
        if self.standing is None or len(self.own) < 2:  # the worst case of one attack is that attack
            self.write()
            return
        robust = self.record("ra_worst_case", self.standing)
        self.report.metrics["ra_worst_case"] = robust
        self.report.metrics["worst_case"] = {"accuracy": robust, "members": self.own}
        self.add_interval("ra_worst_case", self.standing)
        self.add_checks({"worst_case": worst_case_check({**self.own, "union": robust})})
        self.write()

    def sanity(self, num_images: int, square_queries: int) -> None:
        """The sanity checks, on a sample and by the main process alone; arguments as in `run_sanity_checks`."""
        name = f"sanity checks {num_images} images square_queries={square_queries}{self.at}"

        def checked() -> Found:
            if (found := self.measurer.store.load(name)) is not None:
                return found
            checks = run_sanity_checks(
                self.model,
                self.dataset,
                eps=self.attack.eps,
                norm=self.attack.norm,
                steps=self.attack.steps,
                seed=self.attack.seed,
                batch_size=self.measurer.batch_size,
                num_images=num_images,
                square_queries=square_queries,
                progress=self.measurer.progress,
            )
            texts = {n: [json.dumps([check.passed, check.message])] for n, check in checks.items()}
            found = Found(torch.zeros(0, dtype=torch.int64), texts=texts)
            self.measurer.store.save(name, found)
            return found

        try:
            found = self.processes.from_main(checked)  # a sample is too small to be worth sharing
        except Exception as error:  # a model on which the checks break down keeps its numbers
            self.report.failures[name] = f"{type(error).__name__}: {error}"
        else:
            self.add_checks({n: Check(*json.loads(texts[0])) for n, texts in found.texts.items()})
        self.write()


__all__ = ["Evaluation"]
