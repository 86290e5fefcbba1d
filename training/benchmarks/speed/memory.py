"""Memory of an RT-ER step: a formula from two small batches, and measured peaks.

Bytes of a step: 4 * parameters * (weight + gradient + momentum) + kept bytes per image * images in the loss, three per
training image. The kept bytes are what a forward keeps for the backward, counted on two batches. The attack before it
needs less: it keeps one third of the images' bytes, and weights folded for it in the place of gradients. A recorded
step (--step_graph) keeps both parts, also between steps: what an evaluation or a last smaller batch needs comes on
top, and with gradient accumulation 4 * parameters for the sums. Peaks are measured over batches and numbers of
experts, each twice the last, until the formula says `--memory_gb`.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from training.benchmarks.shared.recipes import count_parameters
from training.benchmarks.speed.timing import Row, create_moe, even_routes, random_batch, row_of

COPIES = 3  # of the parameters: weights, gradients, momentum
ROWS = 3  # images in the loss per training image: attacked, clean, attacked second expert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Beside those of all parts."""
    add = parser.add_argument
    add("--num_experts", type=int, default=4)
    add("--probe_batch", type=int, default=8, help="images of the smallest batch whose kept bytes are counted")
    add("--peak_batch", type=int, default=8, help="images of the smallest step whose peak is measured")
    add("--memory_gb", type=float, default=2.0, help="peaks are measured up to this prediction, in 1e9 bytes")


def measure(args: argparse.Namespace) -> list[Row]:
    """A row per peak, predicted over measured: batches with `num_experts` experts, then experts with one batch."""
    model = create_moe(args, args.num_experts)
    kept = [kept_bytes(model, factor * args.probe_batch, args) for factor in (1, 2)]
    per_image, rows = ROWS * (kept[1] - kept[0]) / args.probe_batch, []

    def fits(num_experts: int, batch_size: int) -> bool:
        parameters = count_parameters(create_moe(args, num_experts))
        predicted = 4 * COPIES * parameters + per_image * batch_size
        if predicted <= args.memory_gb * 1e9:
            measured = measured_peak(args, num_experts, batch_size)
            rows.append(peak_row(num_experts, batch_size, parameters, per_image, predicted, measured))
        return predicted <= args.memory_gb * 1e9

    batch_size, num_experts = args.peak_batch, 2 * args.num_experts
    while fits(args.num_experts, batch_size):
        batch_size *= 2
    while fits(num_experts, args.peak_batch):
        num_experts *= 2
    return rows


def peak_row(
    num_experts: int, batch_size: int, parameters: int, per_image: float, predicted: float, measured: float
) -> Row:
    """One row: the formula with its numbers, and how far it is from the measured bytes."""
    formula = f"12 * {parameters / 1e6:.1f}M parameters + {per_image / 1e6:.1f} MB * {batch_size} images"
    what = f"{num_experts} experts: {formula} = {predicted / 1e9:.2f} GB, over the measured {measured / 1e9:.2f} GB"
    return row_of(what, [predicted / measured]) | {"predicted": predicted, "measured": measured}


def kept_bytes(model: nn.Module, batch_size: int, args: argparse.Namespace) -> int:
    """Bytes that a forward in training mode keeps for the backward, beside the parameters."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else its address could be given again
        return tensor

    images, labels = random_batch(args, batch_size)
    routes = even_routes(batch_size, model.config.num_experts, args.device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.cross_entropy(model.train()(images, expert_index=routes).logits, labels)
    return sum(kept.values())


def measured_peak(args: argparse.Namespace, num_experts: int, batch_size: int) -> int:
    """Largest number of bytes that tensors take at once in the loss of a step, its backward and the optimizer."""
    model = create_moe(args, num_experts).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images, labels = random_batch(args, ROWS * batch_size)
    routes = even_routes(len(images), num_experts, args.device)

    def step() -> None:
        F.cross_entropy(model(images, expert_index=routes).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the momentum
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, images, labels)
    with tracker:
        step()
    return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
