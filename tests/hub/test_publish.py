"""`training/publish.py` and the checks before an upload; nothing here may reach a network (HF_HUB_OFFLINE is set)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripts

from hf_dualmoe.evaluation.report import RobustnessReport
from hf_dualmoe.hub import publish as hub
from hf_dualmoe.hub import upload_plan
from hf_dualmoe.hub.local_paths import is_private, shorten_paths
from hf_dualmoe.hub.model_card import MARKER
from hf_dualmoe.hub.publish import publish_folder
from hf_dualmoe.hub.upload_plan import check_no_token, hide_tokens, plan_upload
from training import publish as script
from training import run

TOKEN = "hf_" + "n0tReal" * 5


@pytest.fixture
def folder(make_moe, tmp_path):
    """A saved mixture with results and a plot."""
    path = tmp_path / "run" / "model"
    make_moe().save_pretrained(path)
    RobustnessReport(
        model={"kind": "mixture of experts"},
        dataset={"name": "digits", "num_images": 20},
        threat={"norm": "linf", "eps": 0.1},
        metrics={"sa": 75.0, "ra_pgd20": 40.0},
    ).save(path / "results.json")
    (path / "tradeoff.png").write_bytes(b"plot")
    (path / "outcomes.parquet").write_bytes(b"record")
    return path


@pytest.fixture
def publish(folder, capsys):
    """Run the script on the folder; returns exit status and all that was printed."""

    def call(*arguments, repo_id="user/name"):
        code = scripts.call(script, "--model", folder, "--repo_id", repo_id, *arguments)
        return code, "".join(capsys.readouterr())

    return call


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- what would be sent ----------------------------------------------------------------------------------------------


def test_dry_run_lists_all_files_with_sizes_and_changes_nothing(publish, folder):
    (folder / "notes.txt").write_text("not for others")
    (folder / "checkpoint-3").mkdir()
    before = contents(folder)
    code, text = publish("--dry_run")
    assert code == 0 and contents(folder) == before
    sent = set(before) - {"notes.txt"} | {"README.md"}
    lines = [line.split() for line in text.splitlines()]
    listed = {line[1]: int(line[0].replace(",", "")) for line in lines if len(line) == 2 and line[1] in sent}
    code_files = {name for name in before if name.endswith("_dualmoe.py")}
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "results.json", "outcomes.parquet"}
    assert set(listed) == sent == code_files | others | {"tradeoff.png", "README.md"}
    assert all(listed[name] == len(before[name]) for name in sent - {"README.md"})
    assert "Left out: checkpoint-3, notes.txt" in text
    assert MARKER in text and "| PGD-20 | 40.00 |" in text and "Warning" not in text


def test_missing_results_are_a_warning_and_the_card_claims_nothing(publish, folder):
    (folder / "results.json").unlink()
    code, text = publish("--dry_run")
    assert code == 0 and "Warning: no results.json" in text and "has not been measured yet" in text


def test_doubts_are_shown_to_the_publisher(publish, folder):
    report = RobustnessReport.load(folder / "results.json")
    report.suspicious, report.failures = ["large_eps: 30 % at 0.5"], {"dial": "broke"}
    report.save(folder / "results.json")
    text = publish("--dry_run")[1]
    assert "suspicious, and the card says so: large_eps: 30 % at 0.5" in text and "failed in part" in text


def test_card_that_somebody_edited_is_sent_as_it_is(folder):
    rendered = plan_upload(folder, "user/name").card
    (folder / "README.md").write_text(rendered)
    for old in ("user/name", "# name", "- name: name"):
        rendered = rendered.replace(old, old[: -len("name")] + "other")
    assert plan_upload(folder, "user/other").card == rendered
    edited = rendered.replace(MARKER, "").replace("# other", "# My bird model")
    (folder / "README.md").write_text(edited)
    assert plan_upload(folder, "user/other").card == edited


def test_sharded_weights(make_moe, folder):
    make_moe().save_pretrained(folder, max_shard_size="100KB")
    with pytest.raises(ValueError, match="not clear which weights would be loaded"):
        plan_upload(folder, "u/n")
    (folder / "model.safetensors").unlink()
    shards = sorted(path.name for path in folder.glob("model-*"))
    assert len(shards) > 1 and set(shards) | {"model.safetensors.index.json"} <= set(plan_upload(folder, "u/n").files)
    (folder / shards[1]).unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1]}"):
        plan_upload(folder, "u/n")


def test_model_of_transformers_own_needs_no_code(native_vit, tmp_path):
    native_vit.save_pretrained(tmp_path)
    upload = plan_upload(tmp_path, "user/vit")
    assert set(upload.files) == {"config.json", "model.safetensors"} and len(upload.warnings) == 2
    assert "trust_remote_code" not in upload.card and "preprocessor_config.json" in upload.warnings[1]


# --- refusals, all before anything is sent ---------------------------------------------------------------------------


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BREAK = {
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "config.json is not JSON": lambda folder: (folder / "config.json").write_text("{"),
    "names no model_type": lambda folder: (folder / "config.json").write_text("{}"),
    "lacks model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "model.safetensors is not a safetensors file": lambda folder: (folder / "model.safetensors").write_bytes(
        b"\x80pkl"
    ),
    "lacks moe_dualmoe.py": lambda folder: (folder / "moe_dualmoe.py").unlink(),
    "lacks validation_dualmoe.py": lambda folder: (folder / "validation_dualmoe.py").unlink(),
    "holds pytorch_model.bin": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80"),
    "holds optimizer.pt, training_args.bin": lambda folder: [
        (folder / name).write_bytes(b"\x80") for name in ("optimizer.pt", "training_args.bin")
    ],
    "results.json is not a report": lambda folder: (folder / "results.json").write_text('{"accuracy": 100}'),
    "metadata cannot be read": lambda folder: (folder / "README.md").write_text("---\ntags: [\n---\nHello\n"),
    "pipeline_tag=None": lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\nHello\n"),
    "config.json holds what looks like an access token": lambda folder: change_config(folder, note=TOKEN),
    "README.md holds what looks like an access token": lambda folder: (folder / "README.md").write_text(
        "---\nlicense: mit\npipeline_tag: image-classification\nlibrary_name: transformers\n---\nMine: " + TOKEN
    ),
}


@pytest.mark.parametrize("message", BREAK)
def test_bad_folders_are_refused(publish, folder, message):
    BREAK[message](folder)
    code, text = publish("--dry_run")
    assert code == 2 and message in text and TOKEN not in text and "Traceback" not in text


@pytest.mark.parametrize("repo_id", ["name", "a/b/c", "user/na me", "user/", "user/-name", "user/a--b", ""])
def test_bad_ids_are_refused(publish, repo_id):
    code, text = publish("--dry_run", repo_id=repo_id)
    assert code == 2 and f"repo_id={repo_id!r} is not valid" in text


def test_missing_folder_is_refused(folder):
    with pytest.raises(ValueError, match="is not a folder"):
        plan_upload(folder / "nowhere", "user/name")
    with pytest.raises(ValueError, match="is not a folder"):
        plan_upload(folder / "config.json", "user/name")


def test_pickles_can_be_left_out_instead(folder):
    (folder / "training_args.bin").write_bytes(b"\x80")
    upload = plan_upload(folder, "user/name", refuse_pickles=False)
    assert "training_args.bin" not in upload.files and "training_args.bin" in upload.left_out


# --- code that imports code ------------------------------------------------------------------------------------------


def test_code_that_other_code_imports_is_sent(publish, folder):
    modeling = folder / "moe_dualmoe.py"
    modeling.write_text(modeling.read_text() + "\nfrom .first_helper import (\n    one,\n)\n")
    (folder / "first_helper.py").write_text("from .second_helper import two\nfrom .first_helper import one\n")
    (folder / "unrelated.py").write_text("secret = 1\n")
    code, text = publish("--dry_run")
    assert code == 2 and "lacks second_helper.py, which the auto_map of a JSON file or one" in text
    (folder / "second_helper.py").write_text("two = 2\n")
    upload = plan_upload(folder, "user/name")
    assert {"first_helper.py", "second_helper.py", "configuration_dualmoe.py"} <= set(upload.files)
    assert "unrelated.py" in upload.left_out


def test_code_of_an_image_processor_is_sent(folder):
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["auto_map"] = {"AutoImageProcessor": "image_processing_own.OwnProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="lacks image_processing_own.py"):
        plan_upload(folder, "user/name")
    (folder / "image_processing_own.py").write_text("from .resizing_own import resize\n")
    (folder / "resizing_own.py").write_text("resize = None\n")
    assert {"image_processing_own.py", "resizing_own.py"} <= set(plan_upload(folder, "user/name").files)


# --- paths of the publisher's machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/photos", "photos"),
        ("/home/me/photos/", "photos"),
        (r"C:\Users\me\photos", "photos"),
        ("~/work/photos", "photos"),
        ("file /data/x/a.png: broken, as /data/x/b.png", "file a.png: broken, as b.png"),
        ("file:///home/me/photos, file:/home/me/photos", "photos, photos"),
        ("file:///C:/Users/me/photos", "photos"),
        (r"\\srv\me\photos and //srv/me/photos", "photos and photos"),
        (r"\\srv\photos", "photos"),
        ("https://arxiv.org/abs/2502.06832 and user/name", "https://arxiv.org/abs/2502.06832 and user/name"),
        ("L∞ 8/255, path/to/this/folder, <b>/</b>, and/or", "L∞ 8/255, path/to/this/folder, <b>/</b>, and/or"),
    ],
)
def test_paths_are_shortened_and_nothing_else(text, expected):
    assert shorten_paths(text) == expected


def test_paths_in_results_and_configs_stay_at_home(folder):
    report = RobustnessReport.load(folder / "results.json")
    report.dataset["name"], report.failures = "/home/me/photos", {"dial": "no file /home/me/photos/a.png"}
    report.save(folder / "results.json")
    change_config(folder, standard={"_name_or_path": "/home/me/part", "vision_config": {"_name_or_path": "."}})
    before = contents(folder)
    upload = plan_upload(folder, "user/name")
    sent = {op.path_in_repo: op.path_or_fileobj for op in upload.operations()}
    assert json.loads(sent["results.json"])["dataset"]["name"] == "photos"
    assert json.loads(sent["config.json"])["standard"] == {"_name_or_path": "", "vision_config": {"_name_or_path": ""}}
    assert not any(b"/home/me" in text for text in (sent["results.json"], sent["config.json"], upload.card.encode()))
    assert upload.sizes()["results.json"] == len(sent["results.json"])
    assert Path(sent["model.safetensors"]) == folder / "model.safetensors" and contents(folder) == before
    change_config(folder, cache="/home/me/cache")
    with pytest.raises(ValueError, match="config.json holds a path of somebody's machine, '/home/me/cache'"):
        plan_upload(folder, "user/name")


@pytest.mark.parametrize("path", ["file:///home/me/secret", r"\\srv\me\secret"])
def test_addresses_of_files_in_configs_are_refused(folder, path):
    change_config(folder, cache=path)
    with pytest.raises(ValueError, match="config.json holds a path of somebody's machine, ") as error:
        plan_upload(folder, "user/name")
    assert repr(path) in str(error.value)


def test_class_names_that_look_like_paths_are_published_as_they_are(folder):
    """OpenImages names its classes /m/07v9_z."""
    config = json.loads((folder / "config.json").read_text())
    names = [f"/m/07v9_{i}" for i in range(len(config["id2label"]))]
    labels = {"id2label": {str(i): name for i, name in enumerate(names)}, "class_names": names}
    change_config(folder, **labels, label2id={name: i for i, name in enumerate(names)})
    report = RobustnessReport.load(folder / "results.json")
    report.dataset["class_names"] = names
    report.save(folder / "results.json")
    sent = {op.path_in_repo: op.path_or_fileobj for op in plan_upload(folder, "user/name").operations()}
    assert Path(sent["config.json"]) == folder / "config.json"
    assert Path(sent["results.json"]) == folder / "results.json"


def test_path_in_an_edited_card_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    edited = plan_upload(folder, "user/name").card.replace(MARKER, "") + "\n#!/usr/bin/env python\n"
    (folder / "README.md").write_text(edited)
    assert plan_upload(folder, "user/name").card == edited
    for path in ("/home/me/photos/birds", "file:///home/me/photos", folder.resolve() / "results.json"):
        (folder / "README.md").write_text(f"{edited}\nTrained on {path}.\n")
        with pytest.raises(ValueError, match=f"README.md holds a path of somebody's machine, '{path}"):
            plan_upload(folder, "user/name")


@pytest.mark.parametrize(
    ("home", "path", "private"),
    [
        ("/home/me", "/home/me/photos", True),
        ("/home/me", "file:///home/me/photos", True),
        ("/home/me", "/home/meredith/photos", False),
        ("/home/me", "/usr/bin/env", False),
        ("/root", "/root/photos", True),
        ("/root", "~/photos", True),
        ("/", "/usr/bin/env", False),
    ],
)
def test_paths_below_the_home_folder_are_private(home, path, private, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path(home))
    assert is_private(path, tmp_path / "model") is private


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_no_token_is_told_before_anything_is_sent(folder, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="No access token"):
        publish_folder(folder, "user/name")


@pytest.mark.parametrize(
    "arguments",
    [("--token", TOKEN), ("--token", f" {TOKEN}\n"), ("--tokn", TOKEN), (f"--dry_run={TOKEN}",)],
    ids=["given", "with spaces", "mistyped", "misplaced"],
)
@pytest.mark.filterwarnings("ignore:The Hub could not check the card")
def test_token_is_never_printed(publish, arguments):
    code, text = publish(*arguments)
    assert code == 2 and "error" in text and TOKEN not in text


def test_tokens_in_messages_become_stars(monkeypatch):
    monkeypatch.setattr(upload_plan, "get_token", lambda: "stored-secret")
    assert hide_tokens(f"Bearer {TOKEN}, mine, stored-secret", "mine") == "Bearer ***, ***, ***"
    assert hide_tokens("hf_dualmoe and hf_hub_download stay") == "hf_dualmoe and hf_hub_download stay"
    with pytest.raises(ValueError, match="a.json"):
        check_no_token({"a.json": "x stored-secret y"})


# --- what run.py does after training ---------------------------------------------------------------------------------


def test_failures_after_training_are_told_and_lose_nothing(capsys):
    def fail():
        raise RuntimeError(f"no card today, {TOKEN}")

    run.attempt("writing the model card", fail)
    assert capsys.readouterr().err == "WARNING: writing the model card failed: RuntimeError: no card today, ***\n"


def test_origins_are_hub_ids_only(tmp_path, monkeypatch):
    data, model = SimpleNamespace(), SimpleNamespace()
    monkeypatch.chdir(tmp_path)
    Path("user/images").mkdir(parents=True)
    data.dataset_name, model.init_experts_from, model.pretrained, model.backbone = "digits", None, False, "resnet18"
    model.model_name_or_path = None
    assert run.origins(data, model) == {}
    data.dataset_name, model.pretrained = "uoft-cs/cifar10", True
    assert run.origins(data, model) == {"dataset_id": "uoft-cs/cifar10", "base_model": "timm/resnet18.a1_in1k"}
    data.dataset_name, model.pretrained, model.init_experts_from = "user/images", False, "user/images"
    assert run.origins(data, model) == {}
