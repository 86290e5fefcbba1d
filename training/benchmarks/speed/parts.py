"""What cpu.py measures: each part of the package against the least that it could cost, or against another way.

Alternatives see the same images and weights. What an attack does by itself, its bare passes do too: no gradients of
weights, and BatchNorm folded into the convolutions.
"""

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks import PGD, frozen
from hf_dualmoe.attacks import autoattack as run_autoattack
from hf_dualmoe.attacks.auto_attack import BACKENDS
from hf_dualmoe.attacks.folding import folded
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from hf_dualmoe.data import ImageTensorDataset, load_splits
from hf_dualmoe.hub import LogitsModel
from hf_dualmoe.losses import jtdmoe_loss, rt_er_loss
from hf_dualmoe.models import logits_of
from hf_dualmoe.trainer import RobustTrainer, RobustTrainingArguments
from training.benchmarks.parity.parity import attacked_images
from training.benchmarks.shared.store import CHECKOUT
from training.benchmarks.speed.timing import Row, compare, interleaved, row_of

EPS, STEP_SIZE = 8 / 255, 2 / 255
LOSSES = {"rt_er": rt_er_loss, "jtdmoe": partial(jtdmoe_loss, alpha=0.5)}
LOADED = 4  # batches of the input pipeline


# --- models and images -----------------------------------------------------------------------------------------------


def create_moe(args: Namespace, num_experts: int) -> MoEForImageClassification:
    """An untrained mixture of whole ResNet18s, top-1, in eval mode on the device."""
    shape = {"width": args.width, "image_size": args.image_size, "num_labels": 10, "num_experts": num_experts}
    return MoEForImageClassification(MoEConfig(backbone="resnet18", router_top_k=1, **shape)).to(args.device).eval()


def random_batch(args: Namespace, batch_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) in [0, 1] and labels (B,) on the device."""
    size = batch_size or args.batch_size
    images = torch.rand(size, 3, args.image_size, args.image_size, device=args.device)
    return images, torch.randint(0, 10, (size,), device=args.device)


def even_routes(images: Tensor, num_experts: int) -> Tensor:
    """(B,) the same number of images for each expert, in mixed order, as a balanced router would send them.

    An untrained router sends all images to one expert, which needs no dispatch.
    """
    return torch.arange(len(images), device=images.device) % num_experts


def bare_attack(classifier: Callable[[Tensor], object], images: Tensor, labels: Tensor, steps: int) -> None:
    """The least that a gradient attack can do: so many forward passes with gradients of the images."""
    for _ in range(steps):
        points = images.detach().requires_grad_(True)
        loss = F.cross_entropy(logits_of(classifier, points), labels, reduction="sum")
        torch.autograd.grad(loss, points)


# --- mixtures --------------------------------------------------------------------------------------------------------


def moe_step(args: Namespace) -> list[Row]:
    """Forward, and forward with input gradient, of a top-1 mixture against one expert, and image by image."""
    model, (images, labels) = create_moe(args, args.num_experts), random_batch(args)
    routes, expert = even_routes(images, args.num_experts), model.experts[0]

    def mixture(x: Tensor, at: slice = slice(None)) -> Tensor:
        return model(x, expert_index=routes[at]).logits

    def forward(classify: Callable, at: slice = slice(None)) -> None:
        logits_of(classify, images[at])

    def step(classify: Callable, at: slice = slice(None)) -> None:
        value_and_gradient(classify, images[at], labels[at], ce_objective)

    def loop(work: Callable) -> None:
        for i in range(len(images)):
            work(lambda x, at=slice(i, i + 1): mixture(x, at), slice(i, i + 1))

    rows, faster = [], 2.5 if args.device == "cpu" else 20
    with torch.no_grad(), frozen(model), folded(model, images):
        for what, work in (("forward", forward), ("forward + input gradient", step)):
            own = {"mixture": partial(work, mixture)}
            single = {"one expert": partial(work, lambda x: expert(model.normalize(x)))}
            times = interleaved({**own, **single}, args.repeats, args.device)
            rows.append(compare(f"{what} / one expert", times, "mixture", ["one expert"], args.device, at_most=1.15))
            times = interleaved({**own, "loop": partial(loop, work)}, max(1, args.repeats // 2), args.device)
            rows.append(compare(f"per-sample loop / {what}", times, "mixture", ["loop"], args.device, at_least=faster))
    return rows


def routed_step(model: MoEForImageClassification, images: Tensor, labels: Tensor) -> None:
    """Forward and input gradient of evenly routed images."""
    routes = even_routes(images, model.config.num_experts)
    value_and_gradient(lambda x: model(x, expert_index=routes), images, labels, ce_objective)


def experts(args: Namespace) -> list[Row]:
    """Mixtures of 2, 4, 8, ... experts against one expert, and smaller batches against the whole, per image."""
    models, images_and_labels = {"1 experts": create_moe(args, 1)}, random_batch(args)
    for power in range(1, args.most_experts.bit_length()):
        models[f"{2**power} experts"] = create_moe(args, 2**power)
    whole = f"batch {args.batch_size}"
    with torch.no_grad(), ExitStack() as held:
        for model in models.values():
            held.enter_context(frozen(model))
            held.enter_context(folded(model, images_and_labels[0]))
        by_count = {name: partial(routed_step, model, *images_and_labels) for name, model in models.items()}
        times = interleaved(by_count, args.repeats, args.device)
        rows = [
            compare(f"{name} / 1 expert, {whole}", times, name, ["1 experts"], args.device, at_most=1.3)
            for name in [*models][1:]
        ]
        shares = {f"batch {args.batch_size // share}": share for share in (8, 4, 2, 1)}
        by_batch = {
            name: partial(routed_step, models["2 experts"], *random_batch(args, args.batch_size // share))
            for name, share in shares.items()
        }
        times = interleaved(by_batch, args.repeats, args.device)
    for name, share in shares.items():
        times[name] = {clock: [share * value for value in seconds] for clock, seconds in times[name].items()}
    small = [name for name in shares if name != whole]
    return rows + [compare(f"{name} / {whole}, per image", times, name, [whole], args.device) for name in small]


# --- attacks ---------------------------------------------------------------------------------------------------------


def pgd(args: Namespace) -> list[Row]:
    """PGD as in training against its bare passes, and against torchattacks where that is installed."""
    model, (images, labels) = create_moe(args, args.num_experts), random_batch(args)
    attack = PGD(eps=EPS, steps=args.steps, step_size=STEP_SIZE, keep_best=False)

    def bare() -> None:
        with frozen(model), folded(model, images):
            bare_attack(model, images, labels, args.steps)

    alternatives = {"PGD": lambda: attack(model, images, labels), "bare passes": bare}
    if importlib.util.find_spec("torchattacks"):
        import torchattacks

        other = torchattacks.PGD(LogitsModel(model).eval(), eps=EPS, alpha=STEP_SIZE, steps=args.steps)
        other.set_device(args.device)
        alternatives["torchattacks"] = lambda: other(images, labels)
    times = interleaved(alternatives, args.repeats, args.device)
    rows = [compare(f"PGD-{args.steps} / bare passes", times, "PGD", ["bare passes"], args.device, at_most=1.05)]
    if "torchattacks" in times:
        name = f"torchattacks' PGD-{args.steps} / ours"
        rows.append(compare(name, times, "PGD", ["torchattacks"], args.device, at_least=1.0))
    return rows


def autoattack(args: Namespace) -> list[Row]:
    """The AutoAttack union against torchattacks' on the digits model, with the published budgets: one whole union."""
    splits = load_splits("digits", max_train_samples=1)
    images, labels = attacked_images(splits, args.batch_size, with_validation=False, seed=args.seed)
    folder = CHECKOUT / "model_cards" / "digits_dual"
    model, found = AutoModelForImageClassification.from_pretrained(folder).to(args.device).eval(), {}
    settings = {"eps": 0.15, "version": "standard", "seed": args.seed, "batch_size": args.batch_size}

    def union(backend: str) -> None:
        found[backend] = run_autoattack(model, images, labels, backend=backend, progress=False, **settings)

    ours, theirs = BACKENDS
    times = interleaved({side: partial(union, side) for side in BACKENDS}, 1, args.device, warmup=0)
    row = compare(f"{ours}, standard: times faster", times, ours, [theirs], args.device, at_least=2.0)
    standing = {side: 100 * result.robust_accuracy for side, result in found.items()}
    row["what"] += f" (robust {standing[ours]:.2f} % against {standing[theirs]:.2f} %)"
    row["holds"] = row["holds"] and standing[ours] <= standing[theirs] + 1e-9
    return [row | {"robust_accuracy": standing, "num_images": len(images)}]


# --- a training step -------------------------------------------------------------------------------------------------


def training_step(args: Namespace) -> list[Row]:
    """RT-ER and JTDMoE steps against the sum of their own passes, and the time spent waiting for images."""
    rows = []
    for method in LOSSES:
        model, batch = create_model(method, args), random_batch(args)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
        alternatives = {
            "step": partial(whole_step, method, model, *batch, optimizer, args.steps),
            "passes": partial(bare_step, model, *batch, optimizer, args.steps),
        }
        times = interleaved(alternatives, args.repeats, args.device)
        rows.append(compare(f"{method} step / its passes", times, "step", ["passes"], args.device, at_most=1.10))
    return [*rows, idle_share(args)]


def create_model(method: str, args: Namespace) -> nn.Module:
    """A mixture for RT-ER; a standard model of one expert and a mixture for JTDMoE."""
    mixture = create_moe(args, args.num_experts)
    if method == "rt_er":
        return mixture.train()
    return DualMoEForImageClassification.from_models(create_moe(args, 1), mixture).to(args.device).train()


def whole_step(
    method: str, model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, steps: int
) -> None:
    """One training step as the trainer makes it."""
    attack = PGD(eps=EPS, steps=steps, step_size=STEP_SIZE, keep_best=False)
    LOSSES[method](model, images, labels, attack=attack).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def bare_step(model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The passes of one training step, each as often as the step makes it, and nothing else."""
    robust = getattr(model, "robust", model)
    routes = even_routes(images, robust.config.num_experts)
    with frozen(robust), folded(robust, images):
        with torch.no_grad():
            robust.route(images)
            if robust is not model:
                robust(images)
        for _ in range(2):  # one attack on the whole model, one on the second expert
            bare_attack(partial(robust, expert_index=routes), images, labels, steps)
    loss = F.cross_entropy(robust(torch.cat([images] * 3), expert_index=routes.repeat(3)).logits, labels.repeat(3))
    if robust is not model:
        loss = loss + F.cross_entropy(model.standard(images).logits, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def idle_share(args: Namespace) -> Row:
    """Share of a training loop's time spent getting the next batch onto the device, augmented."""
    pixels = torch.randint(256, (LOADED * args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    dataset = ImageTensorDataset(pixels, torch.arange(len(pixels)) % 10, list("0123456789"))
    model = create_model("rt_er", args)
    with TemporaryDirectory() as folder:
        options = {"per_device_train_batch_size": args.batch_size, "use_cpu": args.device == "cpu"}
        options |= {"method": "rt_er", "attack_steps": args.steps, "report_to": "none"}
        trainer = RobustTrainer(model, RobustTrainingArguments(output_dir=folder, **options), train_dataset=dataset)
        batches, batch = iter(trainer.get_train_dataloader()), {}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

        def wait() -> None:
            batch.update(next(batches))
            batch["pixel_values"] = trainer.to_images(batch["pixel_values"])

        def work() -> None:
            whole_step("rt_er", model, batch["pixel_values"], batch["labels"], optimizer, args.steps)

        times = interleaved({"wait": wait, "work": work}, LOADED, args.device, warmup=0)
    clock = "cpu" if args.device == "cpu" else "wall"
    waited, worked = (sum(times[name][clock]) for name in ("wait", "work"))
    return row_of("input pipeline, share of the time", [waited / (waited + worked)], at_most=0.03)
