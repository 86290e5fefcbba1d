"""BatchNorm folding: what is attacked is the model as it stands now, also where its flow has changed since."""

import pytest
import torch
from torch import nn

from hf_dualmoe.attacks import folding
from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.attacks.folding import KEPT_TRIALS, flow_key, foldable_pairs, folded
from hf_dualmoe.models.inputs_dualmoe import trusted_values


class TwoNorms(nn.Module):
    """AdvProp: a second BatchNorm, chosen by a switch."""

    def __init__(self, where="attribute"):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.clean, self.attacked = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.rest = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        for norm in (self.clean, self.attacked):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 3)
        self.where, self.options, self.use_attacked = where, _Options(), False

    def switch(self, on):
        if self.where == "attribute":
            self.use_attacked = on
        else:
            self.options.on = on

    def forward(self, images):
        on = self.use_attacked if self.where == "attribute" else self.options.on
        return self.rest((self.attacked if on else self.clean)(self.conv(images)))


class _Options:
    on = False


def held_and_plain(model, images, trusted=False):
    with torch.no_grad(), frozen(model):
        plain = model(images)
        with trusted_values(trusted), folded(model, images):
            return model(images), plain


@pytest.mark.parametrize(("where", "trusted"), [("attribute", False), ("attribute", True), ("elsewhere", False)])
def test_a_switched_batchnorm_is_noticed(where, trusted):
    model, images = TwoNorms(where).eval(), torch.rand(3, 3, 8, 8)
    outputs = []
    for on in (False, True, False):
        model.switch(on)
        held, plain = held_and_plain(model, images, trusted)
        torch.testing.assert_close(held, plain)
        outputs.append(plain)
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("change", ["replaced", "inserted"])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_changed_layer_is_noticed(change, trusted):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    images = torch.rand(3, 3, 8, 8)
    model[1].running_mean.normal_()
    assert len(foldable_pairs(model, images)) == 1
    if change == "replaced":
        model[1] = nn.BatchNorm2d(8).eval()
        model[1].running_var.fill_(3.0)
    else:
        model.insert(1, nn.Tanh())
    torch.testing.assert_close(*held_and_plain(model, images, trusted))
    assert len(foldable_pairs(model, images)) == (1 if change == "replaced" else 0)


def test_what_was_found_is_kept_while_nothing_changes(monkeypatch):
    model, images, tries, real = TwoNorms().eval(), torch.rand(3, 3, 8, 8), [], folding._try
    monkeypatch.setattr(folding, "_try", lambda *args: tries.append(1) or real(*args))
    for on in (False, False, True, False, True):
        model.switch(on)
        held_and_plain(model, images)
    assert len(tries) == 2
    key = flow_key(model)
    model.conv.weight.data.mul_(2)
    assert flow_key(model) == key


def test_a_model_that_counts_its_calls_is_left_alone_in_the_end():
    class Counting(TwoNorms):
        calls = 0

        def forward(self, images):
            self.calls += 1
            return super().forward(images)

    model, images = Counting().eval(), torch.rand(3, 3, 8, 8)
    model.attacked = model.clean  # a layer that no image reaches would keep all unfolded
    found = [len(foldable_pairs(model, images)) for _ in range(KEPT_TRIALS + 2) if model(images) is not None]
    assert found[0] == 1 and found[-1] == 0


def test_the_comparison_fires_no_hooks():
    model, images, seen = TwoNorms().eval(), torch.rand(3, 3, 8, 8), []
    model.rest.register_forward_hook(lambda *_: seen.append(1))
    with frozen(model), folded(model, images):
        pass
    assert seen == []
    model(images)
    assert seen == [1]


class ByImage(nn.Module):
    """Bright images take another BatchNorm, or another convolution, than dark ones."""

    def __init__(self, switches):
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv2d(1, 4, 3) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.norms[1].running_var.fill_(1e-3)
        self.head, self.switches = nn.LazyLinear(3), switches

    def forward(self, images):
        answers = []
        for image in images:
            bright = int(image.detach().mean() > 0.5)
            conv = self.convs[bright if self.switches == "conv" else 0]
            norm = self.norms[bright if self.switches == "norm" else 0]
            answers.append(self.head(norm(conv(image[None])).flatten(1)))
        return torch.cat(answers)


@pytest.mark.parametrize("switches", ["conv", "norm"])
def test_layers_that_the_first_images_do_not_reach_keep_all_unfolded(switches):
    images = torch.cat([torch.rand(4, 1, 8, 8) * 0.4, 0.6 + torch.rand(4, 1, 8, 8) * 0.4])  # the first are dark
    model = ByImage(switches).eval()
    with torch.no_grad():
        plain = model(images)
        with folded(model, images[:3]):  # all dark: no comparison could tell
            torch.testing.assert_close(model(images), plain, rtol=0, atol=0)
