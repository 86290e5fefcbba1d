"""APGD, FAB, Square and their union.

Digits are attacked in float64: a convolution may round differently at another batch size, and a sign step would then
turn the last bit into a whole step. In float64 that bit lies far below the float32 logits that attacks look at.
"""

import json
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hf_dualmoe.attacks.apgd import APGD, PassCounter
from hf_dualmoe.attacks.auto_attack import VERSIONS, AutoAttackResult, autoattack, remove_state
from hf_dualmoe.attacks.fab import FAB
from hf_dualmoe.attacks.pgd import PGD
from hf_dualmoe.attacks.square import Square
from hf_dualmoe.data.datasets import load_splits, to_unit_range

EPS = {"linf": 0.15, "l2": 0.8}


def norms(delta, norm):
    return delta.flatten(1).abs().amax(dim=1) if norm == "linf" else delta.flatten(1).norm(dim=1)


def attacks(norm, eps=None, steps=12):
    common = {"eps": EPS[norm] if eps is None else eps, "norm": norm}
    return {
        "ce": APGD(steps=steps, **common),
        "dlr": APGD(steps=steps, objective="dlr", restarts=2, **common),
        "dlr_targeted": APGD(steps=steps, objective="dlr_targeted", target_classes=3, **common),
        "fab": FAB(steps=steps, target_classes=3, **common),
        "square": Square(queries=8 * steps, **common),
    }


ATTACKS = list(attacks("linf"))


@pytest.fixture(scope="module")
def digits():
    """A CNN trained against PGD for a few seconds, in float64, and 48 test images (48, 1, 8, 8) with labels."""
    torch.manual_seed(0)
    splits = load_splits("digits")
    layers = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, 10))
    images, labels = to_unit_range(splits.train.images), splits.train.labels
    optimizer, attack = torch.optim.Adam(model.parameters(), 4e-3), PGD(eps=0.12, steps=2, keep_best=False, seed=0)
    for _ in range(12):
        for rows in torch.randperm(len(images)).split(64):
            attacked = attack(model, images[rows], labels[rows])
            loss = F.cross_entropy(model(attacked), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.zero_grad()
    return model.double().eval(), to_unit_range(splits.test.images[:48]).double(), splits.test.labels[:48]


@pytest.fixture
def some(digits):
    """The same CNN and the first 20 of the images."""
    model, images, labels = digits
    return model, images[:20], labels[:20]


class Linear(nn.Module):
    """Five classes on (3, 4, 5) images; `margin` is the exact distance to the boundary where the box does not bind."""

    def __init__(self, classes=5):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(classes, 60, generator=generator))
        self.bias = nn.Parameter(-self.weight.detach().sum(dim=1) / 2)

    def forward(self, images):
        return images.flatten(1) @ self.weight.T + self.bias

    def margin(self, images, labels, norm):
        logits, weight = self(images).detach(), self.weight.detach()
        slope = norms_dual(weight[labels][:, None] - weight[None], norm)  # (B, C)
        distance = (logits.gather(1, labels[:, None]) - logits) / slope.clamp_min(1e-9)
        return distance.scatter(1, labels[:, None], torch.inf).amin(dim=1)


def norms_dual(weight, norm):
    return weight.abs().sum(dim=-1) if norm == "linf" else weight.norm(dim=-1)


def linear_problem(classes=5, count=60):
    model = Linear(classes).eval()
    images = 0.4 + 0.2 * torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(5))
    return model, images, model(images).argmax(dim=1)


class Wrapped(nn.Module):
    """A model with something done to its logits or input."""

    def __init__(self, model, after=lambda logits: logits, before=lambda images: images):
        super().__init__()
        self.model, self.after, self.before = model, after, before
        self.eval()

    def forward(self, images):
        return self.after(self.model(self.before(images)))


class Killed(nn.Module):
    """Counts calls and dies at one of them, as a lost machine would."""

    def __init__(self, model, at=None):
        super().__init__()
        self.model, self.at, self.calls = model, at, 0
        self.eval()

    def forward(self, images):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.model(images)


def small_union(model, images, labels, **kwargs):
    return autoattack(model, images, labels, **{"eps": 0.15, "version": "fast", "progress": False, **kwargs})


# --- guarantees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTACKS)
def test_misclassified_images_come_back_unchanged(digits, name):
    model, images, labels = digits
    wrong = (model(images).argmax(dim=1) + 1) % 10
    assert torch.equal(attacks("linf")[name](model, images[:5], wrong[:5]), images[:5])


# --- strength --------------------------------------------------------------------------------------------------------


def test_strength_order(digits):
    model, images, labels = digits

    def broken(attack):
        return model(attack(model, images, labels)).argmax(dim=1) != labels

    clean = (model(images).argmax(dim=1) != labels).sum()
    pgd = broken(PGD(eps=0.15, steps=40, seed=0)).sum()
    ce, targeted = broken(APGD(eps=0.15, steps=40)), broken(APGD(eps=0.15, steps=40, objective="dlr_targeted"))
    square = broken(Square(eps=0.15, queries=300))
    union = ~small_union(model, images, labels, version="standard_small").robust
    assert clean + 8 < square.sum() <= targeted.sum()
    assert pgd <= ce.sum() + 1
    assert ce.sum() <= targeted.sum()
    assert union.sum() >= max(ce.sum(), targeted.sum(), square.sum()) - 1


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_linear_classifiers_fall_exactly_within_their_margin(norm):
    model, images, labels = linear_problem()
    margin = model.margin(images, labels, norm)
    eps = margin.median().item() * 1.0001
    clear = (margin / eps - 1).abs() > 0.01  # leave out what float32 cannot tell apart
    assert clear.sum() > 50
    result = autoattack(model, images, labels, eps=eps, norm=norm, version="standard_small", progress=False)
    assert torch.equal(result.robust[clear], (margin > eps)[clear])
    for attack in (FAB(eps=eps, norm=norm, steps=10), APGD(eps=eps, norm=norm, objective="dlr_targeted")):
        robust = model(attack(model, images, labels)).argmax(dim=1) == labels
        assert torch.equal(robust[clear], (margin > eps)[clear]), attack


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_nears_the_margin_of_a_linear_classifier(norm):
    model, images, labels = linear_problem(count=30)
    margin = model.margin(images, labels, norm)
    eps = margin.median().item()
    attacked = Square(eps=eps, norm=norm, queries=1500)(model, images, labels)
    robust = model(attacked).argmax(dim=1) == labels
    assert robust[margin > 1.01 * eps].all() and not robust[margin < (0.8 if norm == "linf" else 0.5) * eps].any()


# --- APGD ------------------------------------------------------------------------------------------------------------


def test_dlr_attacks_a_model_whose_cross_entropy_has_no_gradient(digits):
    model, images, labels = digits
    loud = Wrapped(model, after=lambda logits: 1000 * logits)
    stood = {}
    for objective in ("ce", "dlr"):
        attacked = APGD(eps=0.15, steps=20, objective=objective)(loud, images, labels)
        stood[objective] = (model(attacked).argmax(dim=1) == labels).sum()
    assert stood["dlr"] + 5 < stood["ce"]


# --- FAB -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.25), ("l2", 0.5)])
def test_fab_pulls_the_nearest_misclassified_point_into_the_ball(norm, eps):
    """Its first step ends before the boundary, on a plain from which the next one leaps out of the ball."""
    images, labels = torch.full((2, 1, 2, 2), 0.2), torch.zeros(2, dtype=torch.int64)

    def model(x):
        moved = x.flatten(1).mean(dim=1) - 0.2
        climb = 5 * moved.clamp_max(0.05) + 0.5 * (moved - 0.05).clamp(0, 0.15) + 5 * (moved - 0.2).clamp_min(0)
        return torch.stack([torch.full_like(climb, 0.425), climb], dim=1)  # the boundary is where moved = 0.22

    assert (model(FAB(eps=eps, norm=norm, steps=2)(model, images, labels)).argmax(dim=1) == 1).all()


def test_fab_steps_over_the_boundary_and_back_towards_the_image():
    linear, images, labels = linear_problem(classes=2, count=4)
    seen = []

    def model(x):
        seen.append(x.detach().clone())
        return linear(x)

    margin = linear.margin(images, labels, "l2")
    attacked = FAB(eps=margin.min().item() / 10, norm="l2", steps=3)(model, images, labels)
    assert torch.equal(attacked, images)  # the boundary is out of reach
    _, first, across, back, _, _, _, last = seen  # clean; before and after each of three steps; pulled into the ball
    assert torch.equal(first, images)
    torch.testing.assert_close(norms(across - images, "l2"), 1.05 * margin, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(back, images + 0.9 * (across - images))
    torch.testing.assert_close(norms(last - images, "l2"), (margin.min() / 10).expand(4), rtol=1e-3, atol=1e-5)


# --- Square ----------------------------------------------------------------------------------------------------------


def test_square_needs_no_gradients_and_stops_at_its_budget(digits):
    model, images, labels = digits
    counter = PassCounter(lambda x: model(x).detach())
    attack = Square(eps=0.15, queries=60)
    attacked = attack(counter, images, labels)
    robust = model(attacked).argmax(dim=1) == labels
    clean = model(images).argmax(dim=1) == labels
    assert counter.gradient_rows == 0 and robust.sum() < clean.sum()
    most = len(images) + 60 * clean.sum()  # proposals that change nothing are not asked
    assert len(images) + 20 * robust.sum() < counter.forward_rows < most


# --- the union -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def small_version(monkeypatch):
    """The standard union with budgets for tests."""
    budgets = {"apgd-ce": {"steps": 30}, "apgd-t": {"steps": 30, "target_classes": 9}}
    budgets |= {"fab-t": {"steps": 10, "target_classes": 4}, "square": {"queries": 100}}
    monkeypatch.setitem(VERSIONS, "standard_small", budgets)
    monkeypatch.setitem(VERSIONS, "tiny", {"apgd-ce": {"steps": 2}, "square": {"queries": 3}})


def test_result_is_consistent_and_fits_json(digits):
    model, images, labels = digits
    result = small_union(model, images, labels, version="standard_small")
    assert isinstance(result, AutoAttackResult)
    found = model(result.adversarial).argmax(dim=1)
    assert torch.equal(found == labels, result.robust)
    assert torch.equal(model(images).argmax(dim=1) == labels, result.clean_correct)
    unbroken = result.robust | ~result.clean_correct
    assert torch.equal(result.adversarial[unbroken], images[unbroken])
    assert norms(result.adversarial - images, "linf").max() <= 0.15 + 1e-6
    shares = list(result.accuracy.values())
    assert list(result.accuracy) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert shares == sorted(shares, reverse=True) and shares[0] == result.clean_accuracy
    assert shares[-1] == result.robust_accuracy < shares[0]
    assert 0 < result.passes["gradient"] < result.passes["forward"]
    loaded = json.loads(json.dumps(result.to_dict()))
    assert loaded["robust_accuracy"] == result.robust_accuracy and loaded["backend"].startswith("hf_dualmoe")
    assert loaded["budgets"]["apgd-t"] == {"steps": 30, "target_classes": 9} and len(loaded["flags"]) == 5
    assert "not AutoAttack standard" in result.name
    result.version = "standard"
    assert result.name == "AutoAttack standard (apgd-ce, apgd-t, fab-t, square)"


def test_the_standard_budgets_are_the_published_ones():
    assert VERSIONS["standard"] == {
        "apgd-ce": {"steps": 100},
        "apgd-t": {"steps": 100, "target_classes": 9},
        "fab-t": {"steps": 100, "target_classes": 9},
        "square": {"queries": 5000},
    }


def test_the_union_is_its_attacks_one_after_the_other(some):
    model, images, labels = some
    ids = torch.arange(len(images)) + 7
    result = small_union(model, images, labels, ids=ids, seed=3)
    standing = model(images).argmax(dim=1) == labels
    parts = [APGD(eps=0.15, steps=20, seed=3), Square(eps=0.15, queries=200, seed=3)]
    parts.insert(1, APGD(eps=0.15, steps=20, objective="dlr_targeted", target_classes=3, seed=3))
    for attack, share in zip(parts, list(result.accuracy.values())[1:], strict=True):
        standing &= model(attack(model, images, labels, ids=ids)).argmax(dim=1) == labels
        assert share == standing.double().mean().item()
    assert torch.equal(standing, result.robust)
    other = small_union(model, images, labels, ids=ids, seed=3, batch_size=5)
    assert torch.equal(other.robust, result.robust)
    torch.testing.assert_close(other.adversarial, result.adversarial)


@pytest.mark.parametrize("at", [8, 60, 250])
def test_a_killed_run_goes_on_where_it_was(some, tmp_path, at):
    model, images, labels = some
    file = tmp_path / "state.safetensors"
    whole = Killed(model)
    expected = small_union(whole, images, labels, batch_size=10)
    killed = Killed(model, at=at)
    with pytest.raises(KeyboardInterrupt):
        small_union(killed, images, labels, batch_size=10, state_file=file)
    second = Killed(model)
    result = small_union(second, images, labels, batch_size=10, state_file=file)
    assert torch.equal(result.adversarial, expected.adversarial) and result.accuracy == expected.accuracy
    assert result.flags == expected.flags
    assert second.calls < whole.calls - at // 4
    again = Killed(model)
    finished = small_union(again, images, labels, batch_size=3, state_file=file)
    assert again.calls == 2 and torch.equal(finished.robust, expected.robust)
    assert finished.passes["gradient"] >= expected.passes["gradient"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.safetensors", "state.safetensors.images"]


def test_each_broken_image_is_written_once_and_what_was_not_finished_is_passed_over(some, tmp_path):
    model, images, labels = some
    file = tmp_path / "state.safetensors"
    expected = small_union(model, images, labels, batch_size=3, state_file=file)
    kept = tmp_path / "state.safetensors.images"
    broken = int((expected.clean_correct & ~expected.robust).sum())
    assert kept.stat().st_size == broken * (8 + images[0].numel() * images.element_size()) > 0
    with safe_open(file, framework="pt") as state:
        assert all(state.get_tensor(name).ndim < 4 for name in state.keys())  # noqa: SIM118 - not a dict
    kept.write_bytes(kept.read_bytes() + b"half a record")
    assert torch.equal(small_union(model, images, labels, state_file=file).adversarial, expected.adversarial)
    kept.write_bytes(b"")
    with pytest.raises(ValueError, match="has lost images"):
        small_union(model, images, labels, state_file=file)
    remove_state(file)
    assert not list(tmp_path.iterdir())


def test_a_state_file_refuses_what_it_does_not_belong_to(digits, tmp_path):
    model, images, labels = digits
    images, labels = images[:6], labels[:6]
    file = tmp_path / "state.safetensors"
    small_union(model, images, labels, state_file=file)
    before = file.read_bytes()
    changed = [{"eps": 0.1}, {"norm": "l2"}, {"seed": 1}, {"version": "few_classes"}, {"ids": torch.arange(6) + 1}]
    for other in changed:
        with pytest.raises(ValueError, match="belongs to another run.*" + next(iter(other)).replace("ids", "data")):
            small_union(model, images, labels, **{"state_file": file, **other})
    with pytest.raises(ValueError, match="belongs to another run.*data"):
        small_union(model, images.flip(0), labels, state_file=file)
    with pytest.raises(ValueError, match="belongs to another run.*data"):
        small_union(model, images, (labels + 1) % 10, state_file=file)
    with pytest.raises(ValueError, match="another model"):
        small_union(lambda x: model(x) * 1.01, images, labels, state_file=file)
    with torch.no_grad():
        model[0].bias[0] += 1e-9
    with pytest.raises(ValueError, match="another model"):
        small_union(model, images, labels, state_file=file)
    assert file.read_bytes() == before


def test_a_state_file_of_an_earlier_format_is_refused(digits, tmp_path):
    """It would be read as something else: whole images in place of the attack that broke them, for one."""
    model, images, labels = digits
    file = tmp_path / "state.safetensors"
    save_file({"robust": torch.ones(48, dtype=torch.bool)}, file, metadata={"autoattack": '{"key": {}, "stage": 1}'})
    remedy = "delete it and state.safetensors.images, or give another file"
    with pytest.raises(ValueError, match=f"another version .*format 1; this version keeps format 2.; {remedy}"):
        small_union(model, images, labels, state_file=file)
    file.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=f"cannot be read .*; {remedy}"):
        small_union(model, images, labels, state_file=file)


def test_a_changed_alpha_refuses_to_resume(make_dual, tmp_path):
    """The dial of a dual model is no weight, but changes what is evaluated."""
    model = make_dual()
    shape = (2, model.config.robust.num_channels, model.config.robust.image_size, model.config.robust.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    labels = model(images).logits.argmax(dim=1)
    settings = {"eps": 0.02, "version": "tiny", "state_file": tmp_path / "state.safetensors"}
    result = small_union(model, images, labels, **settings)
    assert not result.flags["probability_output"].raised  # log-probabilities are fine
    assert not result.flags["random_output"].raised and not result.flags["changing_model"].raised
    model.set_alpha(model.config.alpha + 0.05)
    with pytest.raises(ValueError, match="another model"):
        small_union(model, images, labels, **settings)


# --- sanity flags ----------------------------------------------------------------------------------------------------


def test_an_honest_model_raises_no_flag(some):
    model, images, labels = some
    assert small_union(model, images, labels).raised_flags == {}
    assert small_union(Wrapped(model, after=lambda z: z.log_softmax(dim=1)), images, labels).raised_flags == {}


class Adapting(nn.Module):
    """Moves its bias at each call, in place or by gradients, or sets itself to train mode."""

    def __init__(self, model, how):
        super().__init__()
        self.model, self.how = model, how
        self.register_buffer("seen", torch.zeros(()))
        self.eval()

    def forward(self, images):
        if self.how == "buffer":
            self.seen += 1
        if self.how == "train":
            self.model[1].train()
        if self.how == "gradient":
            with torch.enable_grad():
                probe = images.detach().requires_grad_(True)
                images = images + 0 * torch.autograd.grad(self.model(probe).logsumexp(dim=1).sum(), probe)[0]
        return self.model(images)


class Clock:
    """No module, so nothing to compare but its outputs: they move with every call after the first ones."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, images):
        self.calls += 1
        return self.model(images) * torch.linspace(1, 1 + 0.1 * (self.calls > 20), 10)


def flag_cases(model):
    def noisy(logits):
        return logits + 0.01 * torch.randn_like(logits)

    def rounded(logits):  # steps hide all gradients
        return (logits * 4).round() + 0 * logits

    return {
        "random_output": Wrapped(model, after=noisy),
        "probability_output": Wrapped(model, after=lambda logits: logits.softmax(dim=1)),
        "zero_gradients": Wrapped(model, after=rounded),
        "square_stronger": Wrapped(model, after=rounded),
        "changing_model": Adapting(model, "buffer"),
        "changing_model/train": Adapting(model, "train"),
        "changing_model/outputs": Clock(model),
        "changing_model/gradient": Adapting(model, "gradient"),
    }


@pytest.mark.parametrize("case", flag_cases(None))
def test_each_flag_is_raised_by_a_model_built_to_raise_it(some, case):
    model, images, labels = some
    result = small_union(flag_cases(model)[case], images, labels)
    assert case.split("/")[0] in result.raised_flags, result.flags
    masked = {"zero_gradients", "square_stronger"}
    expected = masked if case in masked else {case.split("/")[0]}
    if case != "changing_model/train":  # there the batch statistics make it depend on the batch, too
        assert set(result.raised_flags) == expected
    assert result.to_dict()["flags"][case.split("/")[0]]["raised"] is True


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, objective", [(2, "dlr"), (3, "dlr_targeted")])
def test_too_few_classes_are_refused(classes, objective):
    model, images, labels = linear_problem(classes, count=4)
    with pytest.raises(ValueError, match=f"needs at least {classes + 1} classes; the model has {classes}"):
        APGD(eps=0.01, objective=objective)(model, images, labels)


def test_a_union_for_few_classes():
    model, images, labels = linear_problem(2, count=30)
    counter = PassCounter(model)
    with pytest.raises(ValueError, match="at least 4 classes.*"):
        autoattack(counter, images, labels, eps=0.01, progress=False)
    assert counter.forward_rows < 10 * len(images)  # refused before the work
    margin = model.margin(images, labels, "linf")
    result = autoattack(
        model, images, labels, eps=margin.median().item() * 1.01, version="few_classes", progress=False
    )
    assert list(result.budgets) == ["apgd-ce", "fab-t", "square"]
    assert torch.equal(result.robust, margin > result.eps)


def test_logits_that_turn_nan_under_attack_are_refused(digits):
    model, images, labels = digits
    clean = images.clone()

    def fragile(x):
        moved = (x - clean[0]).abs().amax(dim=(1, 2, 3)) > 0
        return model(x) + torch.where(moved & (x[:, 0, 0, 0] != clean[0, 0, 0, 0]), torch.nan, 0.0)[:, None]

    assert (model(images[:1]).argmax(dim=1) == labels[:1]).all()
    with pytest.raises(ValueError, match="NaN or infinite on images attacked by"):
        small_union(fragile, images[:1], labels[:1])


def test_the_union_refuses_what_it_cannot_do(digits, monkeypatch):
    model, images, labels = digits
    images, labels = images[:3], labels[:3]
    with pytest.raises(ValueError, match="version='plus' is not one of 'standard'"):
        small_union(model, images, labels, version="plus")
    with pytest.raises(ValueError, match="backend='foolbox' is not one of"):
        small_union(model, images, labels, backend="foolbox")
    with pytest.raises(ValueError, match="batch_size=0"):
        small_union(model, images, labels, batch_size=0)
    with pytest.raises(ValueError, match="ids has shape"):
        small_union(model, images, labels, ids=torch.arange(2))
    with pytest.raises(ValueError, match="Square needs"):
        Square(eps=0.1)(lambda x: x, torch.rand(2, 5), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="no gradient flows"):
        small_union(lambda x: model(x).detach(), images, labels)
    with pytest.raises(ValueError, match="no gradient flows"):
        small_union(Wrapped(model, before=lambda x: x.detach()), images, labels)
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(ImportError, match=re.escape("pip install torchattacks")):
        small_union(model, images, labels, backend="torchattacks")


def test_train_mode_is_warned_about_and_not_used(digits):
    model, images, labels = digits
    expected = small_union(model, images[:5], labels[:5])
    model.train()
    with pytest.warns(UserWarning, match="train mode") as caught:
        result = small_union(model, images[:5], labels[:5])
    assert len(caught) == 1 and model.training and torch.equal(result.adversarial, expected.adversarial)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small_union(model, images[:5], labels[:5])


def test_progress_shows_running_accuracy_and_can_be_switched_off(digits, capfd):
    model, images, labels = digits
    small_union(model, images[:5], labels[:5])
    assert capfd.readouterr().err == ""
    small_union(model, images[:5], labels[:5], progress=True)
    shown = capfd.readouterr().err
    assert "apgd-t" in shown and "robust=" in shown


def test_inference_mode_and_channels_last(digits):
    model, images, labels = digits
    expected = small_union(model, images[:6], labels[:6])
    with torch.inference_mode():
        result = small_union(model, images[:6].clone(), labels[:6].clone())
    assert torch.equal(result.adversarial, expected.adversarial)
    strided = images[:6].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small_union(model, strided, labels[:6]).adversarial, expected.adversarial)


def test_torchattacks_agrees(digits):
    pytest.importorskip("torchattacks")
    model, images, labels = digits
    model, images = model.float(), images.float()
    try:
        ours = small_union(model, images, labels, version="standard_small")
        theirs = small_union(model, images, labels, version="standard_small", backend="torchattacks")
    finally:
        model.double()
    assert theirs.backend.startswith("torchattacks ") and ours.robust.sum() <= theirs.robust.sum() + 1
    assert abs(ours.robust_accuracy - theirs.robust_accuracy) <= 2 / len(images)
