"""Publish to a Hub over HTTP, load from it where hf_dualmoe is not installed; two child processes do it all.

The Hub is `hub_server.py`, in a process of its own. huggingface_hub reads HF_ENDPOINT when it is imported, therefore
the children: `PUBLISHER` has the package and a token, `READER` has neither package nor token.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

import hf_dualmoe
from hf_dualmoe.evaluation.report import RobustnessReport

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "s3cr3t" * 6  # not a real one
MODELS = Path(hf_dualmoe.__file__).parent / "models"
CODE = {path.name for path in MODELS.glob("*_dualmoe.py")}  # of a dual model
OF_THE_DIAL = {"merging_dualmoe.py", "mixing_dualmoe.py", "modeling_dualmoe.py"}  # a mixture alone needs none of these
MODEL = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", ".gitattributes", *CODE}

PUBLISHER = """
import contextlib, io, json, runpy, shutil, sys
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers.utils import logging

from hf_dualmoe import DualMoEForImageClassification, MoEConfig, MoEForImageClassification
from hf_dualmoe.data.datasets import ImageTensorDataset
from hf_dualmoe.trainer.trainer import RobustTrainer
from hf_dualmoe.trainer.arguments import RobustTrainingArguments

torch.set_num_threads(1)
logging.disable_progress_bar()
script, token = sys.argv[1:]
api, results = HfApi(), {}

def publish(name, *arguments, folder="first", repo_id="user/dual"):
    sys.argv = ["publish.py", "--model", folder, "--repo_id", repo_id, *arguments]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
    results[name] = {"code": code, "out": output.getvalue(), "err": errors.getvalue()}
    if api.repo_exists(repo_id):
        describe(name, repo_id)

def describe(name, repo_id):
    info = api.repo_info(repo_id)
    found = {"sha": info.sha, "private": info.private, "files": [file.rfilename for file in info.siblings]}
    results[name] = {**results.get(name, {}), **found}

publish("dry run", "--dry_run")
publish("first")
publish("again")
publish("second", folder="second")
publish("branch", "--revision", "trial")
results["branches"] = {branch: api.repo_info("user/dual", revision=branch).sha for branch in ("main", "trial")}
publish("not private", "--private")
publish("private", "--private", repo_id="user/private")
publish("wrong token", "--token", token[::-1].replace("_", "") + "\\n", repo_id="user/denied")
edited = {"README.md": b"---\\nlicense: mit\\n---\\nMy own words.\\n", "notes/picture.png": b"mine"}
for path, content in edited.items():
    api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id="user/private")
publish("edited there", folder="second", repo_id="user/private")
results["kept"] = Path(api.hf_hub_download("user/private", "README.md")).read_text()

model = DualMoEForImageClassification.from_pretrained("first")
model.push_to_hub("user/pushed")
describe("pushed", "user/pushed")
model = DualMoEForImageClassification.from_pretrained("user/pushed")
model.set_alpha(0.875)
model.push_to_hub("pushed", commit_message="Turn the dial")
describe("pushed again", "user/pushed")
next(model.robust.parameters()).data.mul_(2)
model.save_pretrained("saved", push_to_hub=True, repo_id="pushed", commit_message="Saved and pushed")
describe("pushed changed", "user/pushed")

config = MoEConfig(backbone="resnet10t", width=[8, 8, 8, 8], image_size=16, num_labels=3, num_experts=2)
data = ImageTensorDataset(torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8) % 3, list("abc"))
arguments = RobustTrainingArguments(
    output_dir="trained", method="at", attack_steps=1, max_steps=2, save_steps=1, report_to="none", disable_tqdm=True,
    per_device_train_batch_size=4, push_to_hub=True, hub_model_id="user/trained", hub_token=token,
)
trainer = RobustTrainer(MoEForImageClassification(config), arguments, train_dataset=data)
trainer.train()
describe("while training", "user/trained")
shutil.copy("first/results.json", "trained/results.json")
trainer.push_to_hub(blocking=False, tags="my-tag", dataset_tags="user/images").result()
describe("trained", "user/trained")
print(json.dumps(results))
"""

READER = """
import importlib.abc, json, sys
from pathlib import Path

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_dualmoe":
            raise ImportError("hf_dualmoe is not installed here")

sys.meta_path.insert(0, Blocker())

import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.utils import logging

torch.set_num_threads(1)
torch.set_grad_enabled(False)
logging.disable_progress_bar()
inputs, results = load_file("inputs.safetensors"), {}
commits = json.loads(sys.argv[1])
for name, commit in {**commits, "main": None}.items():
    remote = {"trust_remote_code": True, "revision": commit}
    model = AutoModelForImageClassification.from_pretrained("user/dual", **remote)
    logits = model(inputs["images"]).logits
    errors = {version: (logits - inputs[version]).abs().max().item() for version in ("first", "second")}
    folder = Path(snapshot_download("user/dual", revision=commit))
    results[name] = {
        "errors": errors,
        "alpha": model.config.alpha,
        "module": type(model).__module__,
        "files": sorted(path.name for path in folder.iterdir()),
        "card": (folder / "README.md").read_text(),
    }
remote = {"trust_remote_code": True, "revision": commits["first"]}
classify = pipeline("image-classification", model="user/dual", **remote)
old = AutoModelForImageClassification.from_pretrained("user/dual", **remote)
processor = AutoImageProcessor.from_pretrained("user/dual", revision=commits["first"])
probs = old(processor(Image.open("picture.png"), return_tensors="pt").pixel_values).logits.softmax(dim=1)[0]
results["pipeline"] = {entry["label"]: entry["score"] for entry in classify("picture.png", top_k=7)}
results["probs"] = {old.config.id2label[i]: p for i, p in enumerate(probs.tolist())}
results["card"] = [[r.metric_name, r.metric_value] for r in ModelCard.load("user/dual").data.eval_results]
results["cards"] = {name: ModelCard.load("user/" + name).content for name in ("pushed", "trained")}
AutoModelForImageClassification.from_pretrained("user/pushed", trust_remote_code=True)
trained = AutoModelForImageClassification.from_pretrained("user/trained", trust_remote_code=True)
trained.push_to_hub("user/mixture", token=sys.argv[2])
again = AutoModelForImageClassification.from_pretrained("user/mixture", trust_remote_code=True)
small = torch.rand(2, 3, 16, 16)
results["mixture"] = {
    "files": sorted(file.rfilename for file in HfApi().repo_info("user/mixture").siblings),
    "same": torch.equal(trained(small).logits, again(small).logits),
}
try:
    AutoModelForImageClassification.from_pretrained("user/private", trust_remote_code=True)
except OSError as error:
    results["private"] = str(error)
model.push_to_hub("user/reader", token=sys.argv[2])  # the code from the Hub: what transformers does by itself
again = AutoModelForImageClassification.from_pretrained("user/reader", trust_remote_code=True)
results["reader"] = {
    "files": sorted(file.rfilename for file in HfApi().repo_info("user/reader").siblings),
    "same": torch.equal(model(inputs["images"]).logits, again(inputs["images"]).logits),
    "module": type(again).__module__,
}
results["imported"] = sorted(name for name in sys.modules if name.split(".")[0] == "hf_dualmoe")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def hub():
    """Address of a Hub that runs as long as the tests of this file."""
    command = [sys.executable, str(Path(__file__).parents[1] / "hub_server.py"), TOKEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def make_report(sa: float) -> RobustnessReport:
    return RobustnessReport(
        model={"kind": "dual model", "alpha": 0.625},
        dataset={"name": "digits", "num_images": 20, "class_names": list("abcdefg")},
        threat={"norm": "linf", "eps": 8 / 255, "attacks": {"ra_pgd20": "PGD(steps=20)"}},
        metrics={"sa": sa, "ra_pgd20": 40.0},
    )


@pytest.fixture(scope="module")
def folders(make_dual, _images, tmp_path_factory):
    """Two versions of a dual model, the first with a plot, and what they answer to some images."""
    root, tensors = tmp_path_factory.mktemp("hub"), {"images": _images}
    for name, alpha, sa in (("first", 0.625, 75.0), ("second", 0.75, 80.0)):
        model = make_dual(alpha=alpha)
        model.save_pretrained(root / name)
        make_report(sa).save(root / name / "results.json")
        with torch.no_grad():
            tensors[name] = model(_images).logits
    Image.new("RGB", (30, 30), (200, 30, 90)).save(root / "picture.png")
    Image.new("RGB", (8, 8)).save(root / "first" / "tradeoff.png")
    (root / "first" / "checkpoint-1").mkdir()
    (root / "first" / "checkpoint-1" / "optimizer.pt").write_bytes(b"pickle")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "inputs.safetensors")
    return root


def run_child(code: str, folder: Path, hub: str, home: str, *arguments: str, **variables: str):
    """Run Python code against the Hub with a cache of its own; returns the JSON in its last line, and all it wrote."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    own = {"HF_ENDPOINT": hub, "HF_HOME": str(folder / home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment = {**kept, **own, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1]), process.stdout + process.stderr


@pytest.fixture(scope="module")
def published(hub, folders):
    script = str(ROOT / "training" / "publish.py")
    return run_child(PUBLISHER, folders, hub, "publisher", script, TOKEN, HF_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def sent(published):
    return published[0]


@pytest.fixture(scope="module")
def read(published, hub, folders):
    commits = json.dumps({name: published[0][name]["sha"] for name in ("first", "second")})
    return run_child(READER, folders, hub, "reader", commits, TOKEN)[0]


# --- publishing ------------------------------------------------------------------------------------------------------


def test_dry_run_sends_nothing(sent):
    found = sent["dry run"]
    assert found["code"] == 0 and "sha" not in found and "nothing was sent" in found["out"]
    assert "# dual" in found["out"] and 'from_pretrained("user/dual", revision="<commit>"' in found["out"]


def test_each_version_is_one_commit_with_all_files(sent, hub):
    assert sent["first"]["code"] == 0, sent["first"]["err"]
    assert set(sent["first"]["files"]) == MODEL | {"results.json", "tradeoff.png"}
    with urllib.request.urlopen(hub + "/_log") as answer:
        log = json.load(answer)
    commits = [path for method, path, status in log if path.endswith("user/dual/commit/main") and status == 200]
    assert len(commits) == 2  # the two versions
    assert f'revision="{sent["first"]["sha"]}"' in sent["first"]["out"]
    assert sent["again"]["code"] == 0 and "Nothing changed" in sent["again"]["out"]
    assert sent["again"]["sha"] == sent["first"]["sha"] != sent["second"]["sha"]
    assert set(sent["second"]["files"]) == MODEL | {"results.json"}  # the old plot is gone


def test_branch(sent):
    assert sent["branches"]["main"] == sent["second"]["sha"] != sent["branches"]["trial"]


def test_private_repository(sent, read):
    assert sent["private"]["private"] is True and sent["first"]["private"] is False
    assert "user/private" in read["private"]
    assert sent["not private"]["code"] == 2 and "user/dual exists and is public" in sent["not private"]["err"]


def test_card_edited_on_the_hub_is_kept(sent):
    assert "My own words." in sent["kept"] and "edited by somebody" in sent["edited there"]["out"]
    assert {"notes/picture.png", "README.md"} <= set(sent["edited there"]["files"])


def test_refused_token_is_told_and_no_token_is_shown(published):
    found, text = published
    assert found["wrong token"]["code"] == 2 and "401" in found["wrong token"]["err"]
    assert "files" not in found["wrong token"]
    for token in (TOKEN, TOKEN[::-1].replace("_", "")):
        assert token not in text


def test_pushed_model_brings_its_results_only_while_they_are_its_own(sent, read):
    assert set(sent["pushed"]["files"]) == MODEL | {"results.json", "tradeoff.png"}
    assert set(sent["pushed again"]["files"]) == set(sent["pushed"]["files"])  # only the dial was turned
    assert sent["pushed again"]["sha"] != sent["pushed"]["sha"]
    assert set(sent["pushed changed"]["files"]) == MODEL
    assert "has not been measured yet" in read["cards"]["pushed"] and "75.00" not in read["cards"]["pushed"]


def test_trainer_pushes_the_finished_model_without_pickles(sent, read, folders):
    assert sent["while training"]["files"] == [".gitattributes"]
    assert (folders / "trained" / "training_args.bin").is_file()
    assert set(sent["trained"]["files"]) == MODEL - OF_THE_DIAL | {"results.json"}
    card = ModelCard(read["cards"]["trained"])
    assert "my-tag" in card.data.tags and card.data.datasets == ["user/images"]
    assert card.data.eval_results[0].metric_value == 75.0


# --- loading, in a process without the package -----------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["first", "second", "main"])
def test_revision_decides_what_is_loaded(read, asked, sent):
    version = "second" if asked == "main" else asked
    found = read[asked]
    assert found["errors"].pop(version) == 0 and min(found["errors"].values()) > 1e-3
    assert found["alpha"] == {"first": 0.625, "second": 0.75}[version]
    assert found["module"].startswith("transformers_modules.") and read["imported"] == []
    assert set(found["files"]) == set(sent[version]["files"])
    assert f"| clean images (SA) | {75 if version == 'first' else 80}.00 |" in found["card"]


def test_pipeline_gives_the_model_probabilities(read):
    assert read["pipeline"] == pytest.approx(read["probs"], abs=1e-5)


def test_card_on_the_hub_carries_the_results(read):
    assert read["card"] == [["clean images (SA)", 80.0], ["PGD-20", 40.0]]


def test_code_from_the_hub_pushes_itself_on(read):
    assert set(read["reader"]["files"]) == MODEL and read["reader"]["same"]
    assert read["reader"]["module"].startswith("transformers_modules.user.reader.")
    assert set(read["mixture"]["files"]) == MODEL - OF_THE_DIAL and read["mixture"]["same"]
