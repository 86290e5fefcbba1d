"""The demo page without Gradio: loading, looking, attacking, the words and pictures, the exported Space."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import foreign_models
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from hf_dualmoe import DualMoEForImageClassification
from hf_dualmoe.data.decoding import decode_images
from hf_dualmoe.demo import __main__ as command
from hf_dualmoe.demo import scene as scenes
from hf_dualmoe.demo.pictures import SHOWN_SIZE, change_gain, change_picture, pictures_html, to_picture
from hf_dualmoe.demo.scene import (
    AttackSettings,
    Look,
    Route,
    Scene,
    answers,
    attack_scene,
    default_eps,
    kept_alphas,
    load_demo_model,
    look,
    new_scene,
    open_image,
    prepare,
)
from hf_dualmoe.demo.space import export_space, requirements
from hf_dualmoe.demo.words import answers_html, experts, explain, percent, plain, radius, ranges

EPS = 0.15


@pytest.fixture(scope="module")
def digits_folder(_trained_digits, tmp_path_factory):
    """A saved dual model of the trained digits mixture twice (F_S and F_R), with the results.json that names eps."""
    folder = tmp_path_factory.mktemp("digits") / "model"
    model = DualMoEForImageClassification.from_models(_trained_digits.model, _trained_digits.model, alpha=0.75)
    names = [str(i) for i in range(10)]
    model.config.id2label = dict(enumerate(names))
    with torch.no_grad():  # F_R shall differ: it is less sure, and the last two classes are swapped
        for expert in model.robust.experts:
            expert.fc.weight.mul_(0.5)
            expert.fc.weight[[8, 9]] = expert.fc.weight[[9, 8]]
            expert.fc.bias[[8, 9]] = expert.fc.bias[[9, 8]]
    model.save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps({"threat": {"norm": "linf", "eps": EPS}}))
    return folder


@pytest.fixture(scope="module")
def digits_demo(digits_folder):
    return load_demo_model(str(digits_folder))


@pytest.fixture
def settings():
    return AttackSettings(eps=0.3, norm="linf", steps=10, target="F_D", alpha=0.75)


@pytest.fixture
def attacked(digits_demo, settings):
    return attack_scene(digits_demo, new_scene(digits_demo, digits_demo.examples[3].pixels), settings)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_loads_our_model_with_its_threat_and_examples(digits_demo):
    assert digits_demo.dual and digits_demo.parts == ("F_S", "F_R", "F_D") and digits_demo.alpha == 0.75
    assert (digits_demo.eps, digits_demo.norm, digits_demo.num_channels) == (EPS, "linf", 1)
    assert default_eps(digits_demo, "linf") == EPS and default_eps(digits_demo, "l2") == 0.5
    assert [example.caption for example in digits_demo.examples] == [str(i) for i in range(10)]
    assert not digits_demo.model.training
    assert not any(parameter.requires_grad for parameter in digits_demo.model.parameters())
    right = 0
    for digit, example in enumerate(digits_demo.examples):
        assert example.pixels.shape == (1, 1, 8, 8) and 0 <= example.pixels.min() and example.pixels.max() <= 1
        right += int(look(digits_demo, example.pixels).logits["F_S"].argmax()) == digit
    assert right >= 8


def test_loads_a_mixture_without_dial(resnet_moe, tmp_path):
    resnet_moe.save_pretrained(tmp_path)
    demo = load_demo_model(str(tmp_path))
    assert not demo.dual and demo.parts == ("the model",) and demo.alpha is None and demo.examples == []
    scene = new_scene(demo, torch.rand(1, 3, 30, 30))
    route = scene.clean_look.routes["the model"]
    assert len(route.probs) == 4 and sum(route.probs) == pytest.approx(1)
    assert route.experts[0] == np.argmax(route.probs)
    done = attack_scene(demo, scene, AttackSettings(8 / 255, "l2", 2, "the model"))
    assert (done.attacked - done.clean).norm() <= 8 / 255 + 1e-6
    text = explain(demo, done, None)
    assert "The model" in text and "The route stayed at expert" in text and "alpha" not in text


def test_loads_a_foreign_model_and_normalises_inside(native_vit, tmp_path):
    from transformers import ViTImageProcessorPil

    native_vit.save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 30, "width": 30}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    demo = load_demo_model(str(tmp_path))
    pixels = prepare(demo, image)
    assert pixels.shape == (1, 3, 30, 30) and 0 <= pixels.min() and pixels.max() <= 1
    with torch.no_grad():
        expected = native_vit(processor(image, return_tensors="pt")["pixel_values"]).logits[0]
    assert torch.allclose(look(demo, pixels).logits["the model"], expected, atol=1e-4)
    done = attack_scene(demo, new_scene(demo, pixels), AttackSettings(8 / 255, "linf", 2, "the model"))
    assert 0 < (done.attacked - pixels).abs().max() <= 8 / 255 + 1e-6


def test_a_model_without_a_processor_takes_a_given_normalisation(native_vit, tmp_path, monkeypatch, capsys):
    native_vit.save_pretrained(tmp_path / "vit")
    demo = load_demo_model(str(tmp_path / "vit"), image_mean=[0.4], image_std=[0.3])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    pixels = prepare(demo, picture)
    assert torch.allclose(pixels, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255, atol=1e-6)
    with torch.no_grad():
        expected = native_vit((pixels - 0.4) / 0.3).logits[0]
    assert torch.allclose(look(demo, pixels).logits["the model"], expected, atol=1e-4)
    words = ["demo", "--model", str(tmp_path / "vit"), "--image_mean", "0.4", "--export", str(tmp_path / "space")]
    monkeypatch.setattr(sys, "argv", words)
    page = SimpleNamespace(create_page=None, launch_page=None)  # which needs Gradio
    monkeypatch.setitem(sys.modules, "hf_dualmoe.demo.page", page)
    with pytest.raises(SystemExit):
        command.main()
    assert "export needs a model with an image processor" in capsys.readouterr().err


def test_a_processor_that_makes_bytes_is_undone(tmp_path):
    foreign_models.save("vit of 0 .. 255", tmp_path)
    demo = load_demo_model(str(tmp_path))
    pixels = prepare(demo, Image.new("RGB", (32, 32), (51, 102, 255)))
    assert torch.allclose(255 * pixels.amax(dim=(2, 3)).flatten(), torch.tensor([51.0, 102.0, 255.0]))


def test_processor_that_cannot_be_taken_apart_is_refused(digits_demo):
    def odd(images, return_tensors):
        return {"pixel_values": torch.tensor([[-2.0, 2.0]])}

    demo = scenes.replace(digits_demo, processor=odd)
    with pytest.raises(ValueError, match=r"maps images to \[-2, 2\].*expected \[0, 1\]"):
        scenes.check_range(demo)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a saved image classifier nor the id of one on the Hub"):
        load_demo_model(str(tmp_path))
    for name in ("./nowhere", "a/b/c", "/no/folder"):
        with pytest.raises(ValueError, match=re.escape(f"model={name!r}: there is no such folder")):
            load_demo_model(name)


def test_examples_from_a_folder(digits_folder, tmp_path, caplog):
    with pytest.raises(ValueError, match="has no image"):
        load_demo_model(str(digits_folder), examples=tmp_path)
    for name in ("b", "a"):
        Image.new("RGB", (20, 10), name == "a" and "white" or "black").save(tmp_path / f"{name}.png")
    for name in ("._a.png", "broken.png"):  # what a Mac leaves beside each file, and damage
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (20, 10), "gray").save(tmp_path / "more" / "c.png")
    (tmp_path / "zlink").symlink_to(tmp_path / "more")
    demo = load_demo_model(str(digits_folder), examples=tmp_path)
    means = {"a": 1.0, "b": 0.0, "c": 128 / 255}
    assert [e.caption for e in demo.examples] == ["a", "b", "c", "c"]
    assert all(abs(float(e.pixels.mean()) - means[e.caption]) < 1e-6 for e in demo.examples)
    assert "broken.png cannot be read" in caplog.text and "._a.png" not in caplog.text
    export_space(demo, "x/y", tmp_path / "space", examples=str(tmp_path))
    kept = tmp_path / "space" / "examples"
    copied = {str(path.relative_to(kept)) for path in kept.rglob("*.png")}
    assert copied == {"a.png", "b.png", "broken.png", "more/c.png", "zlink/c.png"}


# --- images ----------------------------------------------------------------------------------------------------------


def test_open_image_takes_any_mode_and_turns_it_upright(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = Image.fromarray(ramp)
    for name, image in {"grey.png": grey, "clear.png": grey.convert("RGBA"), "palette.gif": grey}.items():
        image.save(tmp_path / name)
        opened = open_image(tmp_path / name)
        assert opened.mode == "RGB" and np.array_equal(np.asarray(opened)[..., 0], ramp), name
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (10, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (20, 10)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.png", "as an image: no image that can be read"),
        ("floats.tif", "as an image: .*its range is unknown"),
        ("deep.png", "as an image: .*pipeline would clip it"),
    ],
)
def test_open_image_refuses_what_is_none(name, reason, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "floats.tif")
    Image.new("I;16", (4, 4), 300).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=f"{name} cannot be read {reason}"):
        open_image(tmp_path / name)


def test_grey_model_gets_the_pixels_that_it_was_trained_on(digits_demo, tmp_path):
    photo = Image.fromarray(load_sample_images().images[0])
    photo.save(tmp_path / "photo.bmp")
    pixels = prepare(digits_demo, open_image(tmp_path / "photo.bmp"))
    trained = decode_images([{"bytes": None, "path": tmp_path / "photo.bmp"}], 1, image_size=8, num_channels=1)[0]
    assert (255 * pixels - trained).abs().max() <= 1.5


# --- looking and attacking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_dial_mixes_what_was_seen_without_a_forward(digits_demo, alpha, monkeypatch):
    pixels = digits_demo.examples[5].pixels
    with torch.no_grad():
        expected = digits_demo.model(pixels, alpha=alpha).logits[0].softmax(0)
    seen = look(digits_demo, pixels)
    monkeypatch.setattr(type(digits_demo.model), "forward", None)
    found = answers(digits_demo, seen, alpha)
    assert torch.allclose(found["F_D"], expected, atol=1e-6)
    assert torch.allclose(found["F_D"], (1 - alpha) * found["F_S"] + alpha * found["F_R"], atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "eps", "target"), [("linf", 0.2, "F_S"), ("l2", 1.0, "F_R"), ("linf", 0.2, "F_D"), ("l2", 1.0, "F_D")]
)
def test_attack_stays_in_its_ball_and_changes_its_target(digits_demo, norm, eps, target):
    changed = 0
    for example in digits_demo.examples[::2]:
        scene = new_scene(digits_demo, example.pixels)
        done = attack_scene(digits_demo, scene, AttackSettings(eps, norm, 10, target, 0.75))
        delta = done.attacked - example.pixels
        assert (delta.abs().max() if norm == "linf" else delta.norm()) <= eps + 1e-6
        assert 0 <= done.attacked.min() and done.attacked.max() <= 1
        before, after = (answers(digits_demo, seen, 0.75)[target] for seen in (done.clean_look, done.attacked_look))
        assert after[before.argmax()] < before.max()  # each image is less sure at least
        changed += bool(before.argmax() != after.argmax())
    assert changed >= 2
    again = attack_scene(digits_demo, scene, AttackSettings(eps, norm, 10, target, 0.75))
    assert torch.equal(again.attacked, done.attacked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": 8}, "eps=8 is larger than the whole pixel range"),
        ({"norm": "l1"}, "norm='l1'"),
        ({"steps": 0}, "steps=0 must be an integer from 1 to 50"),
        ({"target": "F_X"}, "target='F_X' is not one of F_S, F_R, F_D"),
    ],
    ids=str,
)
def test_attack_refuses_bad_settings(digits_demo, settings, change, message):
    scene = new_scene(digits_demo, digits_demo.examples[0].pixels)
    with pytest.raises(ValueError, match=re.escape(message)):
        attack_scene(digits_demo, scene, scenes.replace(settings, **change))


def test_kept_alphas_are_where_the_answer_stays(digits_demo, attacked):
    kept = kept_alphas(digits_demo, attacked)
    for alpha in (i / 100 for i in range(0, 101, 5)):
        before, after = (
            answers(digits_demo, seen, alpha)["F_D"].argmax() for seen in (attacked.clean_look, attacked.attacked_look)
        )
        assert (alpha in kept) == bool(before == after)


# --- words -----------------------------------------------------------------------------------------------------------


def hand_made(demo, standard=(3, 8), robust=(3, 3), routes=((1, 1), (0, 2))):
    """A scene whose parts say `standard` and `robust` (clean, attacked), by routes alike; 90 % sure each time."""

    def logits(label):
        return torch.full((10,), 0.1 / 9).index_fill(0, torch.tensor(label), 0.9).log()

    def seen(i):
        by_part = {"F_S": Route((routes[0][i],), (0.2, 0.5, 0.3)), "F_R": Route((routes[1][i],), (0.6, 0.1, 0.3))}
        return Look({"F_S": logits(standard[i]), "F_R": logits(robust[i])}, by_part)

    pixels = torch.zeros(1, 1, 8, 8)
    made = AttackSettings(8 / 255, "linf", 20, "F_D", 0.75)
    return Scene(pixels, seen(0), pixels + 4 / 255, seen(1), made)


def test_explanation_says_what_changed_and_what_did_not(digits_demo):
    text = explain(digits_demo, hand_made(digits_demo), 0.75)
    assert "20 PGD steps against F_D at alpha = 0.75" in text
    assert "each pixel by 8 of 255 grey levels (0.0314)" in text
    assert "pixels moved by 4.0 grey levels on average, 4.0 at most" in text
    assert "F_S said 3 (90 %) and **now says 8** (90 %)." in text
    assert "F_R **still says 3** (90 % before, 90 % now)." in text
    assert "F_D **still says 3** (90 % before, 68 % now)." in text
    assert "The route of F_S stayed at expert 1." in text
    assert "The route of F_R **flipped** from expert 0 to expert 2." in text
    assert "F_D withstands this image at alpha = 0.75" in text
    assert re.search(r"at alpha 0\.5[01] to 1\.00;", text)  # 0.50 is a tie
    assert "The dial has moved" not in text
    turned = explain(digits_demo, hand_made(digits_demo), 0.25)
    assert "The attack fools F_D at alpha = 0.25" in turned and "The dial has moved since the attack" in turned
    assert "F_D said 3 (90 %) and **now says 8** (68 %)." in turned


def test_explanation_where_no_dial_helps(digits_demo):
    text = explain(digits_demo, hand_made(digits_demo, robust=(3, 8)), 0.75)
    assert "The attack fools F_D" in text and "at no position of the dial" in text


def test_explanation_before_an_attack_and_before_an_image(digits_demo):
    scene = scenes.replace(hand_made(digits_demo), attacked=None, attacked_look=None)
    text = explain(digits_demo, scene, 0.6)
    assert "F_S says **3** (90 %); F_R says **3** (90 %); F_D says **3** (90 %)" in text and "alpha = 0.60" in text
    assert "Choose an example" in explain(digits_demo, None, 0.6)


def test_numbers_in_words():
    most, least = "more than 99 %", "less than 1 %"
    assert [percent(p) for p in (0.999, 0.42, 0.001, 1.0, 0.0)] == [most, "42 %", least, most, least]
    assert radius(8 / 255, "linf") == "8 of 255 grey levels (0.0314)"
    assert radius(0.5, "l2") == "an L2 distance of 127.5 of 255 grey levels (0.5)"
    assert ranges([0.0, 0.01, 0.5, 0.98, 0.99, 1.0]) == "0.00 to 0.01 and 0.50 and 0.98 to 1.00"
    assert (experts((2,)), experts((2, 0))) == ("expert 2", "experts 2, 0")


def test_class_names_cannot_inject_markup(digits_demo):
    demo = scenes.replace(digits_demo, labels=["<img src=x onerror=alert(1)>", *"12*456789"])
    scene = hand_made(demo, standard=(0, 3))
    assert "<img" not in answers_html(demo, scene, 0.5) and "&lt;img" in answers_html(demo, scene, 0.5)
    text = explain(demo, scene, 0.5)
    assert "<img" not in text.replace("\\<", "") and "**now says \\***" in text
    assert plain("a_b\n# c") == "a\\_b \\# c"


@pytest.mark.parametrize(
    ("attacked", "words"), [((0, 2, 1), "most weight on 0."), ((2, 0, 1), "moved from expert 0 to expert 2.")]
)
def test_where_all_experts_are_mixed_the_first_one_counts(digits_demo, attacked, words):
    scene = hand_made(digits_demo)
    for seen, order in ((scene.clean_look, (0, 1, 2)), (scene.attacked_look, attacked)):
        seen.routes["F_R"] = Route(order, (0.5, 0.3, 0.2))
    text = explain(digits_demo, scene, 0.75)
    assert "The router of F_R mixes all experts, with most weight" in text and words in text
    assert ("flipped" in answers_html(digits_demo, scene, 0.75)) == (attacked[0] != 0)


def test_cards_show_answers_routes_and_flips(digits_demo):
    page = answers_html(digits_demo, hand_made(digits_demo), 0.75)
    cards = dict(re.findall(r'id="card-([^"]+)">(.*?)</section>', page))
    assert list(cards) == ["F_S", "F_R", "F_D"]
    assert cards["F_S"].count("dm-changed") == 1 and cards["F_R"].count("dm-changed") == 0
    assert "flipped" in cards["F_R"] and "flipped" not in cards["F_S"] + cards["F_D"]
    assert "<b>expert 2</b>" in cards["F_R"] and "router" not in cards["F_D"]
    assert "0.25 · F_S + 0.75 · F_R" in cards["F_D"]
    assert answers_html(digits_demo, None, 0.75) == ""


# --- pictures --------------------------------------------------------------------------------------------------------


def test_small_images_are_enlarged_in_squares():
    pixels = torch.rand(1, 1, 8, 8)
    picture = np.asarray(to_picture(pixels))
    factor = SHOWN_SIZE // 8
    assert picture.shape == (8 * factor, 8 * factor, 3)
    assert np.array_equal(picture[::factor, ::factor, 0], (pixels[0, 0] * 255).round().byte().numpy())
    assert (picture[:factor, :factor] == picture[0, 0]).all()
    assert to_picture(torch.rand(1, 3, 500, 400)).size == (400, 500)


def test_change_is_amplified_around_grey():
    clean = torch.full((1, 1, 2, 2), 0.5)
    attacked = clean + torch.tensor([[0.0, 0.1], [-0.1, 0.05]])
    assert change_gain(clean, attacked) == pytest.approx(5) and change_gain(clean, clean) == 1
    small = np.asarray(change_picture(clean, attacked).resize((2, 2), Image.Resampling.NEAREST))[..., 0]
    assert small.tolist() == [[128, 255], [0, 191]]


def test_pictures_html(digits_demo, attacked):
    assert re.findall(r'figure id="(\w+)"', pictures_html(attacked)) == ["clean", "change", "attacked"]
    clean_only = scenes.replace(attacked, attacked=None, attacked_look=None)
    assert re.findall(r'figure id="(\w+)"', pictures_html(clean_only)) == ["clean"] and pictures_html(None) == ""


# --- the Space and the command ---------------------------------------------------------------------------------------


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio")


def test_space_is_complete_and_can_be_written_again(gradio, digits_demo, digits_folder, tmp_path):
    import yaml
    from huggingface_hub import RepoCard

    target = tmp_path / "space"
    for _ in range(2):
        files = {path.name for path in export_space(digits_demo, str(digits_folder), target)}
        assert files == {"app.py", "requirements.txt", "README.md", "hf_dualmoe", "model"}
    assert (target / "model" / "model.safetensors").read_bytes() == (digits_folder / "model.safetensors").read_bytes()
    assert (target / "hf_dualmoe" / "demo" / "page.py").is_file() and not list(target.rglob("__pycache__"))
    header = RepoCard.load(target / "README.md").data.to_dict()
    assert header["sdk"] == "gradio" and header["sdk_version"] == gradio.__version__ and header["app_file"] == "app.py"
    assert yaml.safe_load((target / "README.md").read_text().split("---")[1]) == header
    lines = (target / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch") for line in lines) and not any("pytest" in line for line in lines)
    compile((target / "app.py").read_text(), "app.py", "exec")
    assert "load_demo_model('model', revision='main', trust_remote_code=False" in (target / "app.py").read_text()


def test_space_leaves_training_and_secrets_behind(gradio, digits_demo, digits_folder, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(digits_folder, source)
    for name in ("training_args.bin", "optimizer.pt", ".env", "checkpoint-9/model.safetensors"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("secret")
    export_space(digits_demo, str(source), tmp_path / "space")
    copied = {path.name for path in (tmp_path / "space" / "model").rglob("*")}
    assert copied == {path.name for path in digits_folder.iterdir()}


def test_space_of_a_hub_model_names_it(gradio, digits_demo, tmp_path):
    files = export_space(digits_demo, "user/name", tmp_path, revision="abc")
    assert "model" not in {path.name for path in files}
    assert "'user/name', revision='abc'" in (tmp_path / "app.py").read_text()
    assert "models:\n- user/name" in (tmp_path / "README.md").read_text()


def test_space_does_not_touch_other_folders(digits_demo, digits_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        export_space(digits_demo, str(digits_folder), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_requirements_are_those_of_the_package():
    assert not [line for line in requirements() if "extra" in line]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "there is no such folder"),
        ([], "required: --model"),
        (["--model", "./nowhere", "--port", "many"], "invalid int value"),
    ],
    ids=str,
)
def test_command_refuses_in_one_line(gradio, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        command.main()
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_command_says_how_to_get_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_dualmoe.demo.page", raising=False)
    monkeypatch.setattr(sys, "argv", ["demo", "--model", "x/y"])
    with pytest.raises(SystemExit):
        command.main()
    assert "pip install 'hf_dualmoe[demo]'" in capsys.readouterr().err


def test_command_exports(gradio, digits_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--model", str(digits_folder), "--export", str(tmp_path / "out")])
    command.main()
    assert "Wrote a Space" in capsys.readouterr().out and (tmp_path / "out" / "app.py").is_file()
