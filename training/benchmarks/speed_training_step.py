"""Row 3: an RT-ER and a JTDMoE training step against the sum of its own passes, and the time spent waiting for images.

    python training/benchmarks/speed_training_step.py

The passes of a step are bare calls on tensors of the same sizes: the inner steps of the two attacks, the router, one
forward and backward with weight gradients on all terms' images, the optimizer's step; for JTDMoE also the clean
forward of F_R and F_S's forward and backward. Each is made as often as the step makes it, and those without weight
gradients with BatchNorm folded, once per step.
"""

import argparse
import time
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from speed_timing import compare, create_moe, create_parser, even_routes, interleaved, random_batch, run_script
from torch import Tensor, nn

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.losses.adversarial import jtdmoe_loss, rt_er_loss
from hf_dualmoe.trainer.arguments import RobustTrainingArguments
from hf_dualmoe.trainer.trainer import RobustTrainer

LOSSES = {"rt_er": rt_er_loss, "jtdmoe": partial(jtdmoe_loss, alpha=0.5)}


def create_model(method: str, args: argparse.Namespace) -> nn.Module:
    """A mixture for RT-ER; a standard model of one expert and a mixture for JTDMoE."""
    mixture = create_moe(args, args.num_experts)
    if method == "rt_er":
        return mixture.train()
    return DualMoEForImageClassification.from_models(create_moe(args, 1), mixture).to(args.device).train()


def optimizer_of(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD as the paper uses it, fused into one kernel."""
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)


def bare_passes(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace, with_standard: bool):
    """A call that makes the passes of one step and nothing else."""
    robust = model.robust if with_standard else model
    routes = even_routes(len(images), args.num_experts, args.device)
    optimizer = optimizer_of(model, args)
    three = torch.cat([images] * 3), torch.cat([labels] * 3), torch.cat([routes] * 3)

    def attack_passes() -> None:
        for _ in range(args.steps):
            points = images.detach().requires_grad_(True)
            loss = F.cross_entropy(robust(points, expert_index=routes).logits, labels, reduction="sum")
            torch.autograd.grad(loss, points)

    def passes() -> None:
        with frozen(robust), folded(robust, images):
            with torch.no_grad():
                robust.route(images)
                if with_standard:
                    robust(images)
            attack_passes()
            attack_passes()
        loss = F.cross_entropy(robust(three[0], expert_index=three[2]).logits, three[1])
        if with_standard:
            loss = loss + F.cross_entropy(model.standard(images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return passes


def whole_step(method: str, model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace):
    """A call that makes one training step as the trainer does."""
    attack = PGD(eps=8 / 255, steps=args.steps, step_size=2 / 255, keep_best=False)
    optimizer = optimizer_of(model, args)

    def step() -> None:
        LOSSES[method](model, images, labels, attack=attack).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def idle_share(args: argparse.Namespace) -> dict:
    """Share of a training loop's time spent getting the next batch onto the device, augmented."""
    pixels = torch.randint(0, 256, (args.batch_size * args.idle_batches, 3, args.image_size, args.image_size))
    labels = torch.randint(0, 10, (len(pixels),))
    dataset = ImageTensorDataset(pixels.to(torch.uint8), labels, [str(i) for i in range(10)])
    model = create_model("rt_er", args)
    with TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": args.batch_size, "use_cpu": args.device == "cpu"}
        options |= {"method": "rt_er", "attack_steps": args.steps, "report_to": "none", "dataloader_num_workers": 0}
        trainer = RobustTrainer(model, RobustTrainingArguments(output_dir=folder, **options), train_dataset=dataset)
        step, waiting, working = None, [], []
        batches = iter(trainer.get_train_dataloader())
        for _ in range(args.idle_batches):
            started = time.perf_counter(), time.process_time()
            batch = next(batches)
            images, right = trainer.to_images(batch["pixel_values"]), batch["labels"]
            waiting.append((time.perf_counter() - started[0], time.process_time() - started[1]))
            step = whole_step("rt_er", model, images, right, args)
            times = interleaved({"step": step}, 1, args.device, warmup=0)["step"]
            working.append((times["wall"][0], times["cpu"][0]))
    wall, cpu = (
        sum(w[i] for w in waiting) / sum(w[i] + k[i] for w, k in zip(waiting, working, strict=True)) for i in (0, 1)
    )
    ratio = cpu if args.device == "cpu" else wall
    row = {"what": "input pipeline, share of the time", "ratio": ratio, "range": [ratio, ratio], "wall_ratio": wall}
    return row | {"at_most": 0.03, "at_least": None, "holds": ratio <= 0.03}


def measure(args: argparse.Namespace) -> list[dict]:
    """A row per method, and the idle share."""
    rows = []
    for method in LOSSES:
        model = create_model(method, args)
        images, labels = random_batch(args)
        alternatives = {
            "step": whole_step(method, model, images, labels, args),
            "passes": bare_passes(model, images, labels, args, with_standard=method == "jtdmoe"),
        }
        times = interleaved(alternatives, args.repeats, args.device)
        rows.append(compare(f"{method} step / its passes", times, "step", ["passes"], args.device, at_most=1.10))
    return [*rows, idle_share(args)]


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_training_step")
    parser.set_defaults(repeats=3)
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--idle_batches", type=int, default=4)
    return run_script(parser, measure, arguments, "speed_training_step")


if __name__ == "__main__":
    main()
