import pytest
import torch

from hf_dualmoe.attacks.nfgsm import NFGSM
from hf_dualmoe.trainer.arguments import RobustTrainingArguments

EPS = 8 / 255


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(16, 3, 30, 30, generator=generator)  # away from the ends: nothing is clipped
    return images, torch.randint(0, 7, (16,), generator=generator)


@pytest.mark.parametrize("noise", [0.0, 1.0, 2.0])
def test_step_of_eps_from_noise_that_fills_its_ball(noise, make_moe, batch):
    images, labels = batch
    delta = NFGSM(eps=EPS, noise=noise)(make_moe(), images, labels) - images
    assert delta.abs().max() <= (1 + noise) * EPS + 1e-6
    assert delta.abs().max() > (0.95 + 0.95 * noise) * EPS  # not projected back onto the ball


def test_without_noise_it_is_fgsm_and_raises_the_loss(make_moe, batch):
    model, (images, labels) = make_moe(), batch
    attacked = NFGSM(eps=EPS, noise=0.0)(model, images, labels)
    assert torch.allclose((attacked - images).abs(), torch.tensor(EPS), atol=1e-6)
    loss = [torch.nn.functional.cross_entropy(model(x).logits, labels) for x in (images, attacked)]
    assert loss[1] > loss[0]


def test_kl_objective_attacks_the_clean_prediction(make_moe, batch):
    model, (images, labels) = make_moe(), batch
    torch.manual_seed(0)
    ce = NFGSM(eps=EPS)(model, images, labels)
    torch.manual_seed(0)
    assert not torch.equal(ce, NFGSM(eps=EPS, objective="kl")(model, images, labels))


def test_training_arguments_create_it(tmp_path):
    args = RobustTrainingArguments(output_dir=str(tmp_path), training_attack="nfgsm", eps=0.1, method="trades")
    assert args.create_training_attack(0.5) == NFGSM(eps=0.05, objective="kl")
    with pytest.raises(ValueError, match="norm='l2'"):
        RobustTrainingArguments(output_dir=str(tmp_path), training_attack="nfgsm", norm="l2", eps=0.1)
    with pytest.raises(ValueError, match="training_attack='fgsm'"):
        RobustTrainingArguments(output_dir=str(tmp_path), training_attack="fgsm")
