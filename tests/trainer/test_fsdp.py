"""Two CPU processes that share the weights by FSDP take the steps of one that has them all.

This file is also the script that the launched processes run. It uses torch's `fully_shard` alone: accelerate shards on
accelerators only and runs DDP on CPUs without saying so.
"""

import os
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.steps import ce_objective, project, value_and_gradient
from hf_dualmoe.losses.adversarial import at_loss, jtdmoe_loss, rt_er_loss, trades_loss

VIT = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_kwargs": {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "image_size": 8,
    "num_channels": 1,
    "num_labels": 3,
    "num_experts": 3,
    "router_aux_loss_coef": 0.0,  # balance is about the images of one process
}
STEPS = 3


def build(method, top_k):
    torch.manual_seed(0)
    config = MoEConfig(**VIT, router_top_k=top_k)
    if "jtdmoe" not in method:
        return MoEForImageClassification(config).train()
    parts = MoEForImageClassification(config), MoEForImageClassification(config)
    return DualMoEForImageClassification.from_models(*parts, 0.5).train()


def attack(model, images, labels, **kwargs):
    """Two small steps along the gradient, without chance and without signs that a last bit could turn."""
    attacked = images
    with torch.no_grad(), frozen(model):
        for _ in range(2):
            gradient = value_and_gradient(model, attacked, labels, ce_objective)[0]
            attacked = project(attacked + 10 * gradient, images, 0.1, "linf")
    return attacked


SECOND = {"second_term": "ce", "second_attack": "shared"}
LOSSES = {
    "at": at_loss,
    "trades": trades_loss,
    "rt_er": partial(rt_er_loss, **SECOND),
    "jtdmoe": partial(jtdmoe_loss, alpha=0.5, **SECOND),
    "jtdmoe, mild attacks": partial(jtdmoe_loss, alpha=0.5, standard_attack=attack, **SECOND),
}


def train(model, method, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        LOSSES[method](model, images, labels, attack=attack).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    labels, own = torch.arange(8) % 3, slice(4 * rank, 4 * rank + 4)
    for method, top_k in product(LOSSES, (1, 3)):
        start, whole, shared = (build(method, top_k) for _ in range(3))
        fully_shard(shared, mesh=mesh, reshard_after_forward=False)
        train(whole, method, images, labels)
        train(shared, method, images[own], labels[own])
        found = {name: p.detach().full_tensor() for name, p in shared.named_parameters()}
        moved = [not torch.equal(found[name], p) for name, p in start.named_parameters()]
        error = max(float((found[name] - p).detach().abs().max()) for name, p in whole.named_parameters())
        assert sum(moved) > len(moved) / 3 and error < 1e-4, (method, top_k, sum(moved), len(moved), error)
        if rank == 0:
            sys.stdout.write(f"{method} {top_k}: {error:.1e}\n")
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_training_takes_the_same_steps():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launcher, __file__], capture_output=True, text=True, timeout=600, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(f"{method} {top_k}: " in result.stdout for method, top_k in product(LOSSES, (1, 3)))


def test_weights_that_are_spread_are_gathered_first_and_stay_so(resnet_moe):
    """`frozen` is where every attack begins; parameters that are gathered later would learn in the attack."""
    calls, trunk = [], resnet_moe.trunk
    trunk.unshard = lambda: calls.append(("gather", all(p.requires_grad for p in resnet_moe.parameters())))
    trunk.set_reshard_after_backward = lambda value, recurse: calls.append(("spread", value))
    with frozen(resnet_moe):
        assert not any(p.requires_grad for p in resnet_moe.parameters())
        with frozen(resnet_moe):
            assert calls == [("gather", True), ("spread", False), ("gather", False)]
        assert len(calls) == 3
    assert calls[3:] == [("spread", True)]


if __name__ == "__main__":
    main()
