"""CutMix in a training: the objective gets shares of classes, the attack one class per image."""

import pytest
import torch
from test_step_graph import difference, noise, train, train_the_same  # noqa: F401 (fixtures)
from tiny_training import arguments, build
from torch import nn

from hf_dualmoe.trainer.trainer import RobustTrainer


@pytest.mark.parametrize("method", ["standard", "at", "trades"])
def test_the_objective_gets_shares_and_the_attack_gets_classes(method, noise, tmp_path):  # noqa: F811
    args = arguments(tmp_path, method=method, cutmix_prob=1.0)
    trainer = RobustTrainer(build(method), args, train_dataset=noise)
    trainer.model.train()
    labels = noise.labels[:20]
    images = noise.images[:20].float() / 255
    mixed, targets = trainer.mix(images, labels)
    assert targets.shape == (20, 3) and ((targets > 0).sum(dim=1) == 2).any()
    attacked, objective = [], trainer.objective

    def attack(model, x, y, **_):
        attacked.append((x, y))
        return x

    def seen(model, x, y, **options):
        assert torch.equal(x, mixed) and torch.equal(y, targets)
        return objective(model, x, y, **options)

    trainer.objective = seen
    attacks = dict.fromkeys(trainer.step_attacks(), attack)
    output = trainer.run_objective(trainer.model, mixed, targets, labels, attacks)
    assert output.loss.isfinite()
    assert len(attacked) == (method != "standard")
    assert all(torch.equal(x, mixed) and torch.equal(y, labels) for x, y in attacked)


@pytest.mark.parametrize("method", ["standard", "at", "trades"])
def test_it_trains_the_same_in_a_graph_and_otherwise_than_without(method, train):  # noqa: F811
    options = {"awp_gamma": 0.05, "clean_weight": 0.3} if method == "at" else {}
    ordinary, _ = train_the_same(train, method, cutmix_prob=0.5, **options)
    assert difference(ordinary, train(method, **options)) > 0


@pytest.mark.parametrize(
    ("method", "prob", "message"),
    [
        ("at", 1.5, r"cutmix_prob=1.5 must be in \[0, 1\]"),
        ("at", "much", "cutmix_prob='much' must be a number"),
        ("rt_er", 0.5, "cutmix_prob=0.5 must be 0 with method='rt_er': it is for standard, at, trades"),
    ],
)
def test_what_it_does_not_fit_is_refused(method, prob, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, method=method, cutmix_prob=prob)


def test_a_model_must_say_how_many_classes_it_has(noise, tmp_path):  # noqa: F811
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 3))
    with pytest.raises(ValueError, match=r"cutmix_prob=0.5 needs a model whose config has num_labels"):
        RobustTrainer(model, arguments(tmp_path, cutmix_prob=0.5), train_dataset=noise)
