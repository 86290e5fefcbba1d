"""What many devices would give: memory of an RT-ER step, traffic per step and expected efficiency, on paper.

    python training/benchmarks/speed_scale.py --width 1 --batch_size 128 --gpus 1 8 64

Counted on this machine: parameters, arithmetic per image, the bytes that a forward keeps for the backward (on two
small batches, which predict a third), and the peak of steps over batches and numbers of experts, each twice the last
until the formula says `--memory_gb`. Assumed, as arguments: what a device achieves and what the links carry.

Memory of a step: 4 bytes * parameters * (weight + gradient + momentum) + kept bytes per image * images in the loss
(three per training image). The attack before it needs less: it keeps one third
of the images' bytes, and weights folded for it in the place of gradients. Traffic: each process sends
and receives 2 * (N - 1) / N times the gradients. Nothing of it is taken to overlap with the backward, so the
efficiency is a floor.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from speed_timing import create_moe, create_parser, even_routes, random_batch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.steps import ce_objective, value_and_gradient
from hf_dualmoe.evaluation.environment import describe_environment

COPIES = 3  # of the parameters: weights, gradients, momentum
ROWS = 3  # images in the loss per training image: attacked, clean, attacked second expert


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


def memory_fit(model: nn.Module, args: argparse.Namespace) -> dict:
    """Kept bytes per image and per step from two batches, and how well they predict a third one twice as large."""
    sizes = [args.probe_batch, 2 * args.probe_batch, 4 * args.probe_batch]
    found = [kept_bytes(model, size, args) for size in sizes]
    per_image = (found[1] - found[0]) / (sizes[1] - sizes[0])
    predicted = found[0] + per_image * (sizes[2] - sizes[0])
    return {"per_image": per_image, "batch": sizes[2], "measured": found[2], "error": predicted / found[2] - 1}


def predicted_peak(parameters: int, per_image: float, batch_size: int) -> float:
    """Bytes of a step, by the formula above."""
    return 4 * parameters * COPIES + per_image * ROWS * batch_size


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


def peaks(args: argparse.Namespace, per_image: float) -> list[dict]:
    """Measured and predicted peaks: batches with `num_experts` experts, then experts with the smallest batch."""
    rows = []

    def fits(num_experts: int, batch_size: int) -> bool:
        parameters = sum(p.numel() for p in create_moe(args, num_experts).parameters())
        predicted = predicted_peak(parameters, per_image, batch_size)
        if predicted > args.memory_gb * 1e9:
            return False
        found = measured_peak(args, num_experts, batch_size)
        row = {"num_experts": num_experts, "batch": batch_size, "measured": found, "predicted": predicted}
        rows.append(row | {"error": predicted / found - 1})
        return True

    batch_size, num_experts = args.peak_batch, 2 * args.num_experts
    while fits(args.num_experts, batch_size):
        batch_size *= 2
    while fits(num_experts, args.peak_batch):
        num_experts *= 2
    return rows


def flops_per_image(model: nn.Module, args: argparse.Namespace) -> float:
    """Arithmetic of one RT-ER step per training image: two attacks, then forward and backward of three images."""
    images, labels = random_batch(args, args.probe_batch)
    routes = even_routes(len(images), model.config.num_experts, args.device)
    # times 1: the counter cannot follow a leaf into a module
    with FlopCounterMode(display=False) as attack, torch.no_grad(), frozen(model):
        value_and_gradient(lambda x: model(x * 1, expert_index=routes), images, labels, ce_objective)
    with FlopCounterMode(display=False) as loss:
        F.cross_entropy(model.train()(images, expert_index=routes).logits, labels).backward()
    return (2 * args.steps * attack.get_total_flops() + ROWS * loss.get_total_flops()) / len(images)


def plan(parameters: int, flops: float, gpus: int, args: argparse.Namespace) -> dict:
    """One line of the plan: traffic and time of a step on `gpus` devices."""
    traffic = 2 * (gpus - 1) / gpus * 4 * parameters
    link = args.link_gb_per_second if gpus <= args.gpus_per_machine else args.network_gb_per_second
    compute, exchange = flops * args.batch_size / (args.achieved_tflops * 1e12), traffic / (link * 1e9)
    efficiency = compute / (compute + exchange)
    line = {"gpus": gpus, "gb_per_step": traffic / 1e9, "compute_s": compute, "exchange_s": exchange}
    return line | {"efficiency": efficiency, "images_per_second": gpus * args.batch_size / (compute + exchange)}


def main(arguments: list[str] | None = None) -> dict:
    parser = create_parser(__doc__, "speed_scale")
    add = parser.add_argument
    add("--num_experts", type=int, default=4)
    add("--steps", type=int, default=10)
    add("--probe_batch", type=int, default=8, help="images of the smallest batch that is counted")
    add("--peak_batch", type=int, default=8, help="images of the smallest step whose peak is measured")
    add("--memory_gb", type=float, default=2.0, help="peaks are measured up to this prediction, in 1e9 bytes")
    add("--gpus", type=int, nargs="+", default=[1, 8, 64])
    add("--gpus_per_machine", type=int, default=8)
    add("--achieved_tflops", type=float, default=100.0, help="assumed arithmetic rate of a device, in 1e12 per second")
    add("--link_gb_per_second", type=float, default=300.0, help="assumed, between devices of a machine")
    add("--network_gb_per_second", type=float, default=40.0, help="assumed, per device between machines")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    model = create_moe(args, args.num_experts)
    parameters, memory = sum(p.numel() for p in model.parameters()), memory_fit(model, args)
    flops = flops_per_image(model, args)
    peak = predicted_peak(parameters, memory["per_image"], args.batch_size)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "render")}
    result = {"settings": settings, "environment": describe_environment(args.device), "parameters": parameters}
    result |= {
        "kept": memory,
        "peaks": peaks(args, memory["per_image"]),
        "gflops_per_image": flops / 1e9,
        "predicted_step_gb": peak / 1e9,
    }
    result["plan"] = [plan(parameters, flops, gpus, args) for gpus in args.gpus]
    print(
        f"{parameters / 1e6:.1f}M parameters, {flops / 1e9:.1f} GFLOPs per image and step, {peak / 1e9:.2f} GB a step"
    )
    print(f"kept bytes of a batch of {memory['batch']} predicted within {100 * memory['error']:+.1f} %")
    for row in result["peaks"]:
        print(
            f"peak of {row['num_experts']} experts, batch {row['batch']}: predicted within {100 * row['error']:+.1f} %"
        )
    for line in result["plan"]:
        print(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
    args.output.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
