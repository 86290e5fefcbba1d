"""Trainer: every method learns, terms are logged, weights are averaged, a resumed run equals an unbroken one."""

import copy
import math

import pytest
import torch
from conftest import shake
from tiny_training import arguments as tiny_arguments
from tiny_training import build
from transformers import EvalPrediction, TrainingArguments

from hf_dualmoe.attacks.base import frozen
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.trainer import resumable
from hf_dualmoe.trainer.arguments import METHODS, WITHOUT_ATTACK, PixelValue, RobustTrainingArguments
from hf_dualmoe.trainer.checks import check_batches
from hf_dualmoe.trainer.trainer import RobustTrainer
from hf_dualmoe.trainer.validation import robust_accuracy_metrics


@pytest.fixture(scope="module")
def stripes():
    """Images whose class is the third that is bright, with noise: learnable in seconds."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, (60,), generator=generator)
    images = torch.randint(0, 90, (60, 1, 10, 10), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 3 * label : 3 * label + 4] += 130
    return ImageTensorDataset(images, labels, ["top", "middle", "bottom"])


@pytest.fixture
def arguments(tmp_path):
    def make(method="at", folder="run", **changes):
        settings = {"method": method, "attack_steps": 2, "eval_attack_steps": 2, "num_train_epochs": 2}
        settings |= {"learning_rate": 5e-3, "logging_steps": 2, "crop_padding": 1}
        return tiny_arguments(tmp_path / folder, **{**settings, **changes})

    return make


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_parameter_and_logs_its_terms(method, stripes, arguments):
    if method == "certified":
        pytest.importorskip("deel.torchlip")
    model = build(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = RobustTrainer(model, arguments(method, route_weight=0.1), train_dataset=stripes)
    trainer.train()

    unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged
    terms = {
        "standard": ["loss_ce"],
        "at": ["loss_robust_ce"],
        "trades": ["loss_ce", "loss_kl"],
        "rt_er": ["loss_robust_ce", "loss_expert_kl"],
        "jtdmoe": ["loss_robust_ce", "loss_expert_kl", "loss_dual_ce"],
        "certified": ["loss_ce", "loss_margin", "loss_route"],
    }[method]
    for name in [*terms, "loss_aux", "train_sa", "expert_load_0", "expert_load_1"]:
        assert logged(trainer, name), name
    assert all(math.isfinite(v) for name in terms for v in logged(trainer, name))
    for low, high in zip(logged(trainer, "expert_load_0"), logged(trainer, "expert_load_1"), strict=True):
        assert low + high == pytest.approx(100, abs=0.01)
    assert bool(logged(trainer, "route_flip_rate")) == (method not in WITHOUT_ATTACK)


def test_a_share_of_clean_images_has_its_own_term(stripes, arguments):
    """The logged loss is the weighted sum of the logged terms."""
    trainer = RobustTrainer(build("at"), arguments("at", clean_weight=0.25, logging_steps=1), train_dataset=stripes)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss_ce" in entry]
    assert len(logs) == trainer.state.global_step == 6
    for entry in logs:
        total = 0.75 * entry["loss_robust_ce"] + 0.25 * entry["loss_ce"] + entry["loss_aux"]  # weighted already
        assert entry["loss"] == pytest.approx(total, abs=2e-3) and entry["loss_ce"] < entry["loss_robust_ce"]


def test_adversarial_training_raises_robust_accuracy(stripes, arguments):
    trainer = RobustTrainer(build("at"), arguments("at", num_train_epochs=12), train_dataset=stripes)
    before = trainer.evaluate(stripes)
    trainer.train()
    after = trainer.evaluate(stripes)
    assert after["eval_ra"] > max(before["eval_ra"] + 30, 60)
    assert after["eval_sa"] >= after["eval_ra"]
    assert after["eval_sa_ra_mean"] == pytest.approx((after["eval_sa"] + after["eval_ra"]) / 2)


def test_evaluation_attacks_and_leaves_model_and_random_numbers_alone(stripes, arguments):
    model = build("at")
    shake(model)  # a fresh one hardly looks at its images
    trainer = RobustTrainer(model, arguments("at", eps=0.5, eval_attack_steps=10), eval_dataset=stripes)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.eval()
    trainer.prediction_step(model, stripes.__getitems__(range(60)), prediction_loss_only=False)
    assert torch.equal(random_state, torch.get_rng_state())  # a DataLoader would draw, so it stays out of this
    metrics = trainer.evaluate()
    assert metrics["eval_sa"] > 20 and metrics["eval_ra"] == 0
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    clean_only = RobustTrainer(model, arguments("standard", eval_attack_steps=0), eval_dataset=stripes)
    assert "eval_ra" not in clean_only.evaluate()


@pytest.mark.parametrize("as_list", [False, True], ids=["tensors", "list of items"])
def test_ra_does_not_depend_on_the_batch_size(as_list, stripes, arguments):
    """Or the best checkpoint of a run with another batch size, or other processes, would be another one."""
    dataset = list(stripes) if as_list else stripes
    found = []
    for batch_size in (60, 7):
        settings = {"per_device_eval_batch_size": batch_size, "eval_attack_steps": 1, "eps": 0.3}
        model = build("at")
        shake(model)
        trainer = RobustTrainer(model, arguments("at", **settings), eval_dataset=dataset)
        found.append(trainer.predict(dataset).predictions)
    clean, attacked = zip(*found, strict=True)
    assert clean[0] == pytest.approx(clean[1], abs=1e-5) and attacked[0] == pytest.approx(attacked[1], abs=1e-5)


def test_several_evaluation_sets_keep_their_loaders_apart(stripes, arguments):
    sets = {"few": stripes.take(9), "all": stripes}
    args = arguments("at", dataloader_persistent_workers=True, dataloader_num_workers=1, metric_for_best_model=None)
    trainer = RobustTrainer(build("at"), args, eval_dataset=sets)
    sizes = [len(trainer.get_eval_dataloader(name).dataset) for name in ("few", "all", "few")]
    assert sizes == [9, 60, 9] and trainer.eval_dataset is sets


def test_metrics_count_an_image_as_robust_only_if_right_twice():
    clean = torch.tensor([[2.0, 1.0], [1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]).numpy()  # 0 1 0 1
    attacked = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]]).numpy()  # 0 0 1 1
    labels = torch.tensor([0, 1, 1, 0]).numpy()
    metrics = robust_accuracy_metrics(EvalPrediction(predictions=(clean, attacked), label_ids=labels))
    assert metrics == {"sa": 50.0, "ra": 25.0, "sa_ra_mean": 37.5}


def test_training_does_not_freeze_batchnorm(stripes, arguments):
    """The reference code's attack left the model in eval mode for the rest of the epoch (DESIGN, known faults)."""
    model = build("at", num_experts=1)
    trainer = RobustTrainer(model, arguments("at"), train_dataset=stripes)
    trainer.train()
    assert model.training
    counts = {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {trainer.state.global_step}  # one update a step: not none, and not one for each attack pass


@pytest.mark.parametrize("shared_stages", [0, 2])
def test_gradient_checkpointing_takes_the_same_step(shared_stages, stripes, arguments):
    """Recomputing must not update BatchNorm's running statistics again: the attacks of later steps see them."""
    weights = []
    for enabled in (False, True):
        settings = arguments("rt_er", gradient_checkpointing=enabled, max_steps=3)
        trainer = RobustTrainer(build("rt_er", shared_stages=shared_stages), settings, train_dataset=stripes)
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert all(torch.allclose(weights[0][name], tensor, atol=1e-5) for name, tensor in weights[1].items())


@pytest.mark.parametrize("method", ["at", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "at")])
def test_a_compiled_model_takes_the_same_steps(method, stripes, arguments):
    weights = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = RobustTrainer(build(method), arguments(method, max_steps=2, **compiled), train_dataset=stripes)
        trainer.train()
        weights.append(trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], tensor, atol=1e-5) for name, tensor in weights[1].items())


def test_uint8_and_float_datasets_give_the_same_training(stripes, arguments):
    floats = [{"pixel_values": i["pixel_values"].float() / 255, "labels": i["labels"]} for i in stripes]
    losses = []
    for dataset in (stripes, floats):
        trainer = RobustTrainer(build("at"), arguments("at"), train_dataset=dataset)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["at", "jtdmoe"])
def test_gradient_accumulation_equals_one_large_batch(method, stripes, arguments):
    """Without BatchNorm and random starts, two batches of 10 are one of 20."""
    losses = []
    for batch_size, accumulation in ((20, 1), (10, 2)):
        model = build(method, backbone_kwargs={"norm_layer": "groupnorm1"}, router_aux_loss_coef=0.0)
        args = arguments(
            method,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            crop_padding=0,
            horizontal_flip=False,
            logging_steps=1,
            attack_steps=1,
            attack_step_size=1.0,  # one step of full length ends in a corner of the ball, wherever it starts
            max_steps=2,
            eps=1e-6,
        )
        trainer = RobustTrainer(model, args, train_dataset=stripes)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_resumed_run_equals_unbroken_run_bitwise(stripes, arguments):
    options = {"num_train_epochs": 3, "save_strategy": "epoch", "ema_decay": 0.0}
    whole = RobustTrainer(build("jtdmoe"), arguments("jtdmoe", "whole", **options), train_dataset=stripes)
    whole.train()
    resumed = RobustTrainer(build("jtdmoe"), arguments("jtdmoe", "resumed", **options), train_dataset=stripes)
    with torch.no_grad():  # other weights, so that the test fails where the checkpoint is not read
        for parameter in resumed.model.parameters():
            parameter.add_(1.0)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert resumed.state.global_step == whole.state.global_step == 9
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_ema_is_what_is_evaluated_selected_and_kept(stripes, arguments, monkeypatch):
    monkeypatch.setattr(resumable, "MAX_EMA_LOSS", 100)  # after six steps it may well be behind
    selection = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "sa_ra_mean"}
    args = arguments("at", ema_decay=0.5, save_strategy="epoch", **selection)
    trainer = RobustTrainer(build("at"), args, train_dataset=stripes, eval_dataset=stripes)
    seen = []
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *a, **k: (seen.append(copy.deepcopy(trainer.model.state_dict())), evaluate(*a, **k))[1]
    trainer.train()
    average = trainer.ema.module.state_dict()
    assert all(torch.equal(v, average[name]) for name, v in trainer.model.state_dict().items())
    # the trained weights came back after each evaluation, so they differ from the average that was kept
    assert any(not torch.equal(v, average[name]) for name, v in seen[-1].items())
    best = max(logged(trainer, "eval_sa_ra_mean"))
    assert trainer.evaluate(stripes)["eval_sa_ra_mean"] == pytest.approx(best)


@pytest.mark.parametrize(("average", "kept"), [(81.0, True), (79.0, True), (78.9, False)])
def test_an_average_up_to_a_point_behind_is_kept(average, kept, stripes, arguments, monkeypatch):
    accuracies = iter([80.0, average])
    monkeypatch.setattr(RobustTrainer, "_accuracy", lambda self: next(accuracies))
    trainer = RobustTrainer(build("at"), arguments("at", ema_decay=0.5, max_steps=1), train_dataset=stripes)
    trainer.train()
    assert trainer.keeps_average == kept


def clean_accuracy(model, data):
    """SA in %, in eval mode; the model stays as it is."""
    with torch.no_grad(), frozen(model):
        return 100 * float((model(data.images.float() / 255).logits.argmax(dim=1) == data.labels).float().mean())


@pytest.mark.parametrize("warms_up", [True, False])
def test_the_average_never_ruins_a_short_run(warms_up, stripes, arguments, caplog):
    """Without a warm-up the saved model was mostly its random start; where it is, the trained weights are kept."""
    args = arguments("standard", ema_decay=0.999, num_train_epochs=10, eval_attack_steps=0)
    model = build("standard", num_experts=1, backbone="resnet18")
    trainer = RobustTrainer(model, args, train_dataset=stripes, eval_dataset=stripes)
    trainer.ema.use_warmup = warms_up
    choose, trained = trainer._choose_weights, []
    trainer._choose_weights = lambda: (trained.append(clean_accuracy(trainer.model, stripes)), choose())
    trainer.train()
    averaged = clean_accuracy(trainer.ema.module, stripes)
    assert trained[0] > 90 and clean_accuracy(trainer.model, stripes) >= trained[0] - 1
    assert trainer.keeps_average == warms_up == (averaged >= trained[0] - 1)
    assert ("(ema_decay=0.999) is right for" in caplog.text) != warms_up


def test_ema_with_sharded_weights_is_refused(stripes, arguments, monkeypatch):
    create = RobustTrainer.create_accelerator_and_postprocess

    def create_sharded(self):  # accelerate shards on accelerators only
        create(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(RobustTrainer, "create_accelerator_and_postprocess", create_sharded)
    with pytest.raises(ValueError, match="ema_decay=0.9 does not work with weights that are spread"):
        RobustTrainer(build("at"), arguments("at", ema_decay=0.9), train_dataset=stripes)


def test_resuming_with_ema_needs_its_weights(stripes, arguments):
    plain = RobustTrainer(build("at"), arguments("at", save_strategy="epoch"), train_dataset=stripes)
    plain.train()
    averaged = RobustTrainer(build("at"), arguments("at", ema_decay=0.5), train_dataset=stripes)
    with pytest.raises(FileNotFoundError, match="written without ema_decay"):
        averaged.train(resume_from_checkpoint=f"{plain.args.output_dir}/checkpoint-3")


def test_standard_model_can_have_its_own_learning_rate(stripes, arguments):
    args = arguments("jtdmoe", standard_learning_rate=0.0, learning_rate=1e-2, weight_decay=0.1)
    model = build("jtdmoe")
    before = copy.deepcopy(model.state_dict())
    trainer = RobustTrainer(model, args, train_dataset=stripes)
    trainer.train()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"robust"}
    grouped = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_eps_warmup_grows_linearly(stripes, arguments):
    trainer = RobustTrainer(build("at"), arguments("at", eps_warmup_ratio=0.5), train_dataset=stripes)
    trainer.state.max_steps = 20
    scales = []
    for step in range(20):
        trainer.state.global_step = step
        scales.append(trainer._eps_scale())
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(scales[10:]) == {1.0}
    whole, half = (trainer.args.create_training_attack(scale) for scale in (1.0, 0.5))
    assert half.eps == pytest.approx(0.05) and half.step_size == pytest.approx(whole.step_size / 2)


def test_eps_warmup_reaches_the_attack_on_the_standard_model(stripes, arguments, monkeypatch):
    args = arguments("jtdmoe", norm="l2", eps_warmup_ratio=1.0, standard_eps=0.05, max_steps=2, attack_steps=1)
    create, radii = args.create_standard_attack, []
    monkeypatch.setattr(
        args, "create_standard_attack", lambda *scale: (attack := create(*scale), radii.append(attack.eps))[0]
    )
    RobustTrainer(build("jtdmoe"), args, train_dataset=stripes).train()
    assert radii == pytest.approx([0.025, 0.05])


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        ("jtdmoe", lambda: build("at"), "trains a DualMoEForImageClassification, not a robust_moe"),
        ("rt_er", lambda: build("at", num_experts=1), "num_experts >= 2; got a robust_moe with num_experts=1"),
        ("jtdmoe", lambda: build("jtdmoe", num_experts=1), "num_experts >= 2"),
        ("rt_er", lambda: torch.nn.Linear(2, 2), "got a Linear"),
        ("certified", lambda: build("at"), "needs backbone='lipschitz_mlp' or 'lipschitz_cnn'"),
        ("certified", lambda: build("jtdmoe"), "trains a MoEForImageClassification, not a dual_moe"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(method, model, message, arguments):
    with pytest.raises(ValueError, match=message):
        RobustTrainer(model(), arguments(method))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, "did you mean 8/255"),
        ({"eps": "-1/255"}, "eps=-0.0039"),
        ({"method": "magic"}, "method='magic' is not one of"),
        ({"beta": -1.0}, "beta=-1.0 must be >= 0"),
        ({"train_alpha": 1.5}, r"train_alpha=1.5 must be in \[0, 1\]"),
        ({"method": "jtdmoe", "train_alpha": 1.0}, "F_S would get no gradient"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"clean_weight": 1.0}, r"clean_weight=1.0 must be in \[0, 1\)"),
        ({"clean_weight": -0.1}, r"clean_weight=-0.1 must be in \[0, 1\)"),
        ({"method": "trades", "clean_weight": 0.5}, "clean_weight=0.5 must be 0 with method='trades'"),
        ({"awp_gamma": -0.1}, "awp_gamma=-0.1 must be >= 0 and finite"),
        ({"awp_gamma": math.inf}, "awp_gamma=inf must be >= 0 and finite"),
        ({"awp_gamma": "a"}, "awp_gamma='a' must be a number"),
        ({"hub_strategy": "every_save"}, "hub_strategy='every_save' must be end: checkpoints hold pickles"),
        ({"attack_steps": 0}, "attack_steps=0 must be at least 1"),
        ({"attack_step_size": -0.1}, "attack_step_size=-0.1 must be > 0"),
        ({"eps_warmup_ratio": 2.0}, "eps_warmup_ratio=2.0"),
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"eps": 0.1, "standard_eps": 0.2}, r"standard_eps=0.2 must be in \[0, eps=0.1\]"),
        ({"standard_eps": -0.1}, "standard_eps=-0.1 must be in"),
        ({"norm": "l1"}, "norm='l1'"),
        ({"certify_radius": 0}, "certify_radius=0.0 must be finite and > 0"),
        ({"certify_radius": "wide"}, "certify_radius='wide' must be a number or a fraction"),
        ({"route_weight": -1.0}, "route_weight=-1.0 must be >= 0"),
        ({"margin_weight": math.nan}, "margin_weight=nan must be >= 0"),
        ({"method": "jtdmoe", "standard_learning_rate": -1e-3}, "standard_learning_rate=-0.001 must be >= 0"),
        ({"method": "jtdmoe", "standard_learning_rate": "x"}, "standard_learning_rate='x' must be a number"),
        ({"method": "at", "standard_learning_rate": 1e-3}, "standard_learning_rate=0.001 must be left out where"),
        ({"label_smoothing_factor": 1.5}, r"label_smoothing_factor=1.5 must be in \[0, 1\)"),
        ({"adam_beta1": -0.1}, r"adam_beta1=-0.1 must be in \[0, 1\)"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0 must be > 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be >= 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be >= 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan must be >= 0"),
        ({"warmup_steps": math.nan}, "warmup_steps=nan must be >= 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1 must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 must be at least 1"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 must be > 0"),
        ({"save_steps": -1}, "save_steps=-1 must be > 0"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True must be False: images are made in the collator"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches=False must be True"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics=True must be False"),
        ({"eval_accumulation_steps": 0}, "eval_accumulation_steps=0 must be at least 1"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 must be None: images have no embeddings"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers=True must be left out with"),
        ({"eval_attack_steps": 0, "metric_for_best_model": "eval_ra"}, "metric_for_best_model='ra' needs; give steps"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(settings, message, arguments):
    with pytest.raises(ValueError, match=message):
        arguments(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "accuracy"}, "='accuracy' must be one of loss, sa, ra, sa_ra_mean"),
        ({"metric_for_best_model": "sa", "prediction_loss_only": True}, "one of loss; prediction_loss_only=True"),
        ({"optim_args": "foo"}, "optim_args='foo'.*no optimizer can be made with these settings"),
        ({"optim": "adamw_bnb_8bit"}, "optim='.*no optimizer can be made"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs=.*no optimizer can be made"),
    ],
    ids=str,
)
def test_options_that_would_fail_after_an_epoch_are_refused_before_training(settings, message, stripes, arguments):
    with pytest.raises(ValueError, match=message):
        RobustTrainer(build("at"), arguments("at", **settings), train_dataset=stripes, eval_dataset=stripes)


@pytest.mark.parametrize(
    "settings", [{"metric_for_best_model": "loss"}, {"metric_for_best_model": "eval_sa"}, {}], ids=str
)
def test_metrics_that_are_measured_are_accepted(settings, stripes, arguments):
    trainer = RobustTrainer(build("at"), arguments("at", **settings), eval_dataset=stripes)
    assert f"eval_{(trainer.args.metric_for_best_model or 'loss').removeprefix('eval_')}" in trainer.evaluate()
    with_name = {name: f"mine_{value.removeprefix('eval_')}" for name, value in settings.items()}
    RobustTrainer(build("at"), arguments("at", **with_name), eval_dataset={"mine": stripes})
    own = {"metric_for_best_model": "accuracy"}
    RobustTrainer(build("at"), arguments("at", **own), eval_dataset=stripes, compute_metrics=lambda _: {"accuracy": 1})


ANSWERS = {
    "tensor": lambda logits: logits,
    "dictionary": lambda logits: {"logits": logits},
    "tuple": lambda logits: (logits, None),
}


@pytest.mark.parametrize(
    ("method", "answer"), [("standard", "tensor"), ("trades", "tuple"), *(("at", answer) for answer in ANSWERS)]
)
def test_a_plain_module_is_trained_and_evaluated(method, answer, stripes, arguments):
    class Plain(torch.nn.Linear):
        def forward(self, images):
            return ANSWERS[answer](super().forward(images.flatten(1)))

    args = arguments(method, max_steps=2, logging_steps=1, save_strategy="steps", save_steps=2, ema_decay=0.5)
    trainer = RobustTrainer(Plain(100, 3), args, train_dataset=stripes, eval_dataset=stripes)
    trainer.train()
    assert logged(trainer, "train_sa") and "eval_ra" in trainer.evaluate()


def test_plain_arguments_are_refused(stripes, tmp_path):
    with pytest.raises(TypeError, match="args must be RobustTrainingArguments, .* got TrainingArguments"):
        RobustTrainer(build("at"), TrainingArguments(output_dir=str(tmp_path)), train_dataset=stripes)


def test_mild_attacks_on_the_standard_model_have_their_own_radius(stripes, arguments):
    attack = {"training_attack": "pgd", "attack_steps": 1, "eps": 0.2}
    weights = {}
    for radius in (0.0, 0.05, "1/5"):
        torch.manual_seed(5)
        args = arguments("jtdmoe", max_steps=2, standard_eps=radius, **attack)
        trainer = RobustTrainer(build("jtdmoe"), args, train_dataset=stripes)
        assert ("standard_attack" in trainer.step_attacks()) == (radius != 0.0)
        if radius != 0.0:
            assert trainer.args.create_standard_attack().eps == pytest.approx(0.05 if radius == 0.05 else 0.2)
        trainer.train()
        weights[radius] = trainer.model.standard.state_dict()
    plain, *mild = weights.values()
    assert all(any(not torch.equal(other[name], plain[name]) for name in plain) for other in mild)


def test_pixel_values_may_be_fractions():
    assert PixelValue("8/255") == pytest.approx(8 / 255)
    assert PixelValue(" 0.5/255 ") == pytest.approx(0.5 / 255)
    assert PixelValue("0.1") == 0.1
    with pytest.raises(ValueError, match="must be a number or a fraction such as 8/255"):
        PixelValue("eight/255")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"per_device_train_batch_size": 61}, "train_dataset: a batch takes 61, per_device_train_batch"),
        ({"per_device_eval_batch_size": 61}, "eval_dataset: a batch takes 61, per_device_eval_batch"),
        ({"per_device_train_batch_size": 60, "per_device_eval_batch_size": 60}, None),
    ],
)
def test_dropping_every_batch_is_refused(stripes, arguments, sizes, message):
    def create(**changes):
        return RobustTrainer(build("at"), arguments(**sizes, **changes), train_dataset=stripes, eval_dataset=stripes)

    create()  # nothing is dropped
    if message is None:
        create(dataloader_drop_last=True)
    else:
        with pytest.raises(ValueError, match=f"dataloader_drop_last=True drops all 60 images of {message}"):
            create(dataloader_drop_last=True)


def test_dropping_counts_the_batches_of_all_processes(stripes, arguments, monkeypatch):
    args = arguments(dataloader_drop_last=True, per_device_train_batch_size=20)
    monkeypatch.setattr(RobustTrainingArguments, "world_size", 4)
    with pytest.raises(ValueError, match="a batch takes 80"):
        check_batches(args, train_dataset=stripes)
    args.accelerator_config.split_batches = True  # then a batch is that of all processes together
    check_batches(args, train_dataset=stripes, eval_dataset={"a": stripes})
