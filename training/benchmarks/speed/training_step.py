"""An RT-ER and a JTDMoE training step against the sum of its own passes, and the time spent waiting for images.

The passes of a step are bare calls on tensors of the same sizes: the inner steps of the two attacks, the router, one
forward and backward with weight gradients on all terms' images, the optimizer's step; for JTDMoE also the clean
forward of F_R and F_S's forward and backward. Each is made as often as the step makes it, and those without weight
gradients with BatchNorm folded, once per step.
"""

import argparse
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.attacks import PGD, frozen
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.data import ImageTensorDataset
from hf_dualmoe.losses import jtdmoe_loss, rt_er_loss
from hf_dualmoe.trainer import RobustTrainer, RobustTrainingArguments
from training.benchmarks.speed.timing import (
    Row,
    bare_attack,
    compare,
    create_moe,
    even_routes,
    interleaved,
    random_batch,
    row_of,
)

LOSSES = {"rt_er": rt_er_loss, "jtdmoe": partial(jtdmoe_loss, alpha=0.5)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    parser.set_defaults(repeats=3)
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--idle_batches", type=int, default=4)


def measure(args: argparse.Namespace) -> list[Row]:
    """A row per method, and the idle share."""
    rows = []
    for method in LOSSES:
        model, batch = create_model(method, args), random_batch(args)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
        alternatives = {
            "step": partial(whole_step, method, model, *batch, optimizer, args),
            "passes": partial(bare_step, model, *batch, optimizer, args),
        }
        times = interleaved(alternatives, args.repeats, args.device)
        rows.append(compare(f"{method} step / its passes", times, "step", ["passes"], args.device, at_most=1.10))
    return [*rows, idle_share(args)]


def create_model(method: str, args: argparse.Namespace) -> nn.Module:
    """A mixture for RT-ER; a standard model of one expert and a mixture for JTDMoE."""
    mixture = create_moe(args, args.num_experts)
    if method == "rt_er":
        return mixture.train()
    return DualMoEForImageClassification.from_models(create_moe(args, 1), mixture).to(args.device).train()


def whole_step(
    method: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
) -> None:
    """One training step as the trainer makes it."""
    attack = PGD(eps=8 / 255, steps=args.steps, step_size=2 / 255, keep_best=False)
    LOSSES[method](model, images, labels, attack=attack).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def bare_step(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> None:
    """The passes of one training step, and nothing else."""
    robust = getattr(model, "robust", model)
    routes = even_routes(len(images), args.num_experts, args.device)
    with frozen(robust), folded(robust, images):
        with torch.no_grad():
            robust.route(images)
            if robust is not model:
                robust(images)
        for _ in range(2):  # one attack on the whole model, one on the second expert
            bare_attack(robust, images, labels, args.steps, routes)
    loss = F.cross_entropy(robust(torch.cat([images] * 3), expert_index=routes.repeat(3)).logits, labels.repeat(3))
    if robust is not model:
        loss = loss + F.cross_entropy(model.standard(images).logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def idle_share(args: argparse.Namespace) -> Row:
    """Share of a training loop's time spent getting the next batch onto the device, augmented."""
    pixels = torch.randint(0, 256, (args.batch_size * args.idle_batches, 3, args.image_size, args.image_size))
    dataset = ImageTensorDataset(pixels.to(torch.uint8), torch.arange(len(pixels)) % 10, [str(i) for i in range(10)])
    model = create_model("rt_er", args)
    with TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": args.batch_size, "use_cpu": args.device == "cpu"}
        options |= {"method": "rt_er", "attack_steps": args.steps, "report_to": "none", "dataloader_num_workers": 0}
        trainer = RobustTrainer(model, RobustTrainingArguments(output_dir=folder, **options), train_dataset=dataset)
        batches, batch = iter(trainer.get_train_dataloader()), {}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def wait() -> None:
            batch.update(next(batches))
            batch["pixel_values"] = trainer.to_images(batch["pixel_values"])

        def work() -> None:
            whole_step("rt_er", model, batch["pixel_values"], batch["labels"], optimizer, args)

        times = interleaved({"wait": wait, "work": work}, args.idle_batches, args.device, warmup=0)
    clock = "cpu" if args.device == "cpu" else "wall"
    waited, worked = (sum(times[name][clock]) for name in ("wait", "work"))
    return row_of("input pipeline, share of the time", [waited / (waited + worked)], at_most=0.03)
