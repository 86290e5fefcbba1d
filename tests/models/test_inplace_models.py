"""Models that normalise their images in place get the same attacks, numbers and images as those that do not."""

import pytest
import torch
from torch import nn

from hf_dualmoe.attacks.adaptive_union import worst_case
from hf_dualmoe.attacks.apgd import APGD
from hf_dualmoe.attacks.auto_attack import autoattack
from hf_dualmoe.attacks.fab import FAB
from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.attacks.pgd import FGSM, PGD
from hf_dualmoe.attacks.square import Square
from hf_dualmoe.certification.smoothing import smoothed_certificates
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.evaluation.batches import correct_mask
from hf_dualmoe.evaluation.sanity import run_sanity_checks

EPS, CLASSES = 0.05, 5


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 6 * 6, CLASSES)

    def forward(self, images):
        return self.linear(((images - 0.45) * 4).flatten(1))


class InPlace(Plain):
    def forward(self, images):
        return self.linear(images.sub_(0.45).mul_(4).flatten(1))


@pytest.fixture
def batch():
    images = torch.rand(9, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = Plain()(images).argmax(1)
    labels[0] = (labels[0] + 1) % CLASSES
    return images, labels


ATTACKS = {
    "pgd": PGD(eps=EPS, steps=3, seed=0),
    "pgd last": PGD(eps=EPS, steps=2, seed=0, keep_best=False, objective="kl"),
    "fgsm": FGSM(eps=EPS),
    "n-fgsm": NFGSM(eps=EPS),
    "apgd": APGD(eps=EPS, steps=4, objective="dlr_targeted"),
    "fab": FAB(eps=EPS, steps=3),
    "square": Square(eps=EPS, queries=30),
    "square l2": Square(eps=0.3, norm="l2", queries=30),
}


def numbers(model, images, labels):
    """What evaluations and certificates say of a model, as one comparable thing."""
    names = [str(i) for i in range(CLASSES)]
    dataset = ImageTensorDataset((images * 255).byte(), labels, names)
    checks = run_sanity_checks(model, dataset, eps=EPS, steps=2, square_queries=5, progress=False)
    smoothed = smoothed_certificates(model, images[:2], sigma=0.1, n0=10, n=50)
    return [
        worst_case(model, images, labels, eps=EPS, steps=3).to_dict(),
        autoattack(model, images, labels, eps=EPS, version="fast", progress=False).accuracy,
        correct_mask(model, dataset, attack=ATTACKS["pgd"]).tolist(),
        {name: check.message for name, check in checks.items()},
        smoothed.radius.nan_to_num(-1).tolist(),
    ]


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_returns_what_it_returns_on_the_plain_model(batch, name):
    images, labels = batch
    found = []
    for model in (Plain(), InPlace()):
        before = images.clone()
        torch.manual_seed(2)  # N-FGSM draws from the global generator
        found.append(ATTACKS[name](model.eval(), images, labels))
        assert torch.equal(images, before)
    assert torch.equal(*found) and not torch.equal(found[0], images)
    assert found[1].min() >= 0 and found[1].max() <= 1


def test_evaluations_and_certificates_say_the_same(batch):
    assert numbers(InPlace().eval(), *batch) == numbers(Plain().eval(), *batch)
