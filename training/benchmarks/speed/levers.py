"""Row 4: what lowers the price of a pass, one lever at a time: time and, with a trained model, robust accuracy.

    python training/benchmarks/speed/levers.py
    python training/benchmarks/speed/levers.py --model path/to/model --dataset digits --eps 0.15

Each lever is switched against the same PGD call without it; "robust" is the accuracy on the images that the attack
found, judged in float32 without the lever. Below 1 the lever pays. What the levers of a whole RT-ER step do to robust
accuracy only training can tell: the study of levers has it (studies/digits_levers.yaml).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

sys.path.insert(0, str(Path(__file__).parents[3]))  # the checkout: scripts run from any folder

from hf_dualmoe.attacks import folding as batchnorm_folding
from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.data.datasets import load_splits
from hf_dualmoe.evaluation.environment import pixel_radius
from hf_dualmoe.losses.adversarial import rt_er_loss
from hf_dualmoe.models.outputs import logits_of
from training.benchmarks.parity.parity import attacked_images
from training.benchmarks.speed.timing import compare, create_moe, create_parser, interleaved, random_batch, run_script


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
    "channels_last": lambda device: [without_folding()],  # the model is another, see `measure`
}


def attack_call(lever: str, attack: PGD, model: nn.Module, images: Tensor, labels: Tensor, device: str, found: dict):
    """A call that attacks with the lever on, and leaves what it found in `found`."""

    def run() -> None:
        with ExitStack() as stack:
            for manager in LEVERS[lever](device):
                stack.enter_context(manager)
            found[lever] = attack(model, images, labels, ids=torch.arange(len(images)))

    return run


def step_rows(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> list[dict]:
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


def optimizer_rows(model: nn.Module, args: argparse.Namespace) -> list[dict]:
    """One step of SGD and AdamW, fused against not."""
    rows = []
    for name, make in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        steps = {}
        for fused in (False, True):
            weights = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            steps[f"fused {fused}"] = make(weights, lr=1e-6, weight_decay=1e-4, fused=fused).step
        times = interleaved(steps, args.repeats, args.device)
        rows.append(compare(f"{name} step, fused / not", times, "fused True", ["fused False"], args.device))
    return rows


def measure(args: argparse.Namespace) -> list[dict]:
    """A row per lever."""
    model, (images, labels) = create_moe(args, args.num_experts), random_batch(args)
    if args.model:
        splits = load_splits(args.dataset, max_train_samples=1)
        images, labels = attacked_images(splits, args.batch_size, args.with_validation, args.seed)
        model = AutoModelForImageClassification.from_pretrained(args.model).to(args.device).eval()
        images, labels = images.to(args.device), labels.to(args.device)
    layouts = {"channels_last": type(model)(model.config).to(args.device).eval()}
    layouts["channels_last"].load_state_dict(model.state_dict())
    layouts["channels_last"] = layouts["channels_last"].to(memory_format=torch.channels_last)
    attack, found = PGD(eps=args.eps, steps=args.steps, keep_best=False, seed=args.seed), {}
    calls = {
        lever: attack_call(lever, attack, layouts.get(lever, model), images, labels, args.device, found)
        for lever in LEVERS
    }
    times = interleaved(calls, args.repeats, args.device)
    rows = []
    for lever in LEVERS:
        row = compare(f"PGD-{args.steps}: {lever}", times, lever, ["plain"], args.device)
        if args.model:
            with torch.no_grad():
                right = logits_of(model, found[lever]).argmax(dim=1) == labels
            row["robust_accuracy"] = 100 * right.double().mean().item()
            row["what"] += f" (robust {row['robust_accuracy']:.1f} %)"
        rows.append(row)
    steps = [] if args.model else step_rows(model, images, labels, args)
    return rows + steps + optimizer_rows(model, args)


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_levers")
    parser.set_defaults(repeats=3)
    add = parser.add_argument
    add("--num_experts", type=int, default=4)
    add("--steps", type=int, default=10)
    add("--eps", type=pixel_radius, default=8 / 255, help="radius in [0, 1] pixel units, such as 8/255")
    add("--model", help="saved model folder; without one robust accuracy is left out")
    add("--dataset", default="digits", help="as `load_splits` takes it")
    add("--with_validation", action="store_true", help="attack images of the validation split too")
    return run_script(parser, measure, arguments, "speed_levers")


if __name__ == "__main__":
    main()
