"""What lowers the price of a pass, one lever at a time: time and, with a trained model, robust accuracy.

Each lever is switched against the same PGD call without it; "robust" is the accuracy on the images that the attack
found, classified in float32 without the lever. Below 1 the lever pays. What the levers of a whole RT-ER step do to
robust accuracy only training can tell.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_dualmoe.attacks import NFGSM, PGD
from hf_dualmoe.attacks import folding as batchnorm_folding
from hf_dualmoe.data import load_splits
from hf_dualmoe.losses import rt_er_loss
from hf_dualmoe.models import logits_of
from training.benchmarks.parity.parity import add_attacked, attacked_images
from training.benchmarks.speed.timing import Row, compare, create_moe, interleaved, random_batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    parser.set_defaults(repeats=3)
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    add_attacked(parser, num_images=128)


def measure(args: argparse.Namespace) -> list[Row]:
    """A row per lever: of a PGD call, of an RT-ER step where no trained model is given, of an optimizer's step."""
    if args.model:
        splits = load_splits(args.dataset, max_train_samples=1)
        images, labels = attacked_images(splits, args.num_images, args.with_validation, args.seed)
        model = AutoModelForImageClassification.from_pretrained(args.model).to(args.device).eval()
        rows = attack_rows(model, images.to(args.device), labels.to(args.device), args)
    else:
        model, batch = create_moe(args, args.num_experts), random_batch(args)
        rows = attack_rows(model, *batch, args) + step_rows(model, *batch, args)
    return rows + optimizer_rows(model, args)


# --- an attack -------------------------------------------------------------------------------------------------------


@contextmanager
def without_folding() -> Iterator[None]:
    """BatchNorm as a layer of its own, in attacks too."""
    with mock.patch.object(batchnorm_folding, "foldable_pairs", lambda *_: []):
        yield


@contextmanager
def with_weight_gradients() -> Iterator[None]:
    """Weights that ask for gradients during the attack; nothing keeps these."""

    def not_frozen(parameter: nn.Parameter, wanted: bool = True) -> nn.Parameter:
        return parameter

    with mock.patch.object(nn.Parameter, "requires_grad_", not_frozen):
        yield


LEVERS: dict[str, Callable[[str], list]] = {  # device -> the context managers that are switched on
    "plain": lambda device: [without_folding()],
    "weights not frozen": lambda device: [without_folding(), with_weight_gradients()],
    "BatchNorm folded (default)": lambda device: [],
    "bf16 autocast": lambda device: [without_folding(), torch.autocast(device, torch.bfloat16)],
    "BatchNorm folded, bf16 autocast": lambda device: [torch.autocast(device, torch.bfloat16)],
    "channels_last": lambda device: [without_folding()],  # the model is another, see `attack_rows`
}


def attack_rows(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> list[Row]:
    """PGD with one lever each; robust accuracy where the model is trained."""
    copy = type(model)(model.config).to(args.device).eval()
    copy.load_state_dict(model.state_dict())
    copies = {"channels_last": copy.to(memory_format=torch.channels_last)}
    attack, found = PGD(eps=args.eps, steps=args.steps, keep_best=False, seed=args.seed), {}

    def run(lever: str) -> None:
        with ExitStack() as stack:
            for manager in LEVERS[lever](args.device):
                stack.enter_context(manager)
            found[lever] = attack(copies.get(lever, model), images, labels, ids=torch.arange(len(images)))

    times = interleaved({lever: lambda lever=lever: run(lever) for lever in LEVERS}, args.repeats, args.device)
    rows = []
    for lever in LEVERS:
        row = compare(f"PGD-{args.steps}: {lever}", times, lever, ["plain"], args.device)
        if args.model:
            with torch.no_grad():
                right = logits_of(model, found[lever]).argmax(dim=1) == labels
            row["robust_accuracy"] = 100 * right.double().mean().item()
            row["what"] += f" (robust {row['robust_accuracy']:.1f} %)"
        rows.append(row)
    return rows


# --- a training step -------------------------------------------------------------------------------------------------


def step_rows(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> list[Row]:
    """An RT-ER step, forward and backward, with one lever each; model: hard-routed."""
    pgd, nfgsm = PGD(eps=args.eps, steps=args.steps, keep_best=False), NFGSM(eps=args.eps)

    def forward_per_term(batch: Tensor, expert_index: Tensor, **_) -> SimpleNamespace:
        parts = zip(batch.split(len(images)), expert_index.split(len(images)), strict=True)
        outputs = [model(part, expert_index=index) for part, index in parts]
        logits = torch.cat([output.logits for output in outputs])
        return SimpleNamespace(logits=logits, extra_logits=None, aux_loss=outputs[0].aux_loss)

    def step(attack: PGD | NFGSM = pgd, **settings) -> Callable[[], None]:
        def run() -> None:
            rt_er_loss(model, images, labels, attack=attack, **settings).loss.backward()
            model.zero_grad()

        return run

    reference = f"RT-ER step, two PGD-{args.steps} attacks"
    levers = {
        reference: step(),
        "RT-ER step: a forward for each term": step(forward=forward_per_term),
        "RT-ER step: one attack for both terms": step(second_attack="shared"),
        "RT-ER step: N-FGSM": step(nfgsm),
        "RT-ER step: N-FGSM, one attack for both terms": step(nfgsm, second_attack="shared"),
    }
    model.train()
    times = interleaved(levers, args.repeats, args.device)
    model.eval()
    return [compare(name, times, name, [reference], args.device) for name in levers]


def optimizer_rows(model: nn.Module, args: argparse.Namespace) -> list[Row]:
    """One step of SGD and AdamW, fused against not."""
    rows = []
    for name, make in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        steps = {}
        for kind, fused in (("fused", True), ("not", False)):
            weights = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            steps[kind] = make(weights, lr=1e-6, weight_decay=1e-4, fused=fused).step
        times = interleaved(steps, args.repeats, args.device)
        rows.append(compare(f"{name} step, fused / not", times, "fused", ["not"], args.device))
    return rows
