"""The command that runs all speed benchmarks, the count of recompilations, and Square's shortcut."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from torch import nn

from hf_dualmoe.attacks.apgd import PassCounter
from hf_dualmoe.attacks.square import Square, _Streams, propose_l2, propose_linf, start_l2, start_linf, window_size
from hf_dualmoe.attacks.steps import margin_objective, per_image
from hf_dualmoe.models.outputs import logits_of

TRAINING = Path(__file__).parents[2] / "training"
BENCHMARKS = TRAINING / "benchmarks"
TINY = ["--device", "cpu", "--repeats", "1", "--width", "0.125", "--image_size", "8", "--batch_size", "6"]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def by_name(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return by_name


# --- one command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def speed(load, monkeypatch):
    module = load("speed")
    parts = {
        "first": ("The first", "speed_first", ["--x", "1"]),
        "second": ("The second", "speed_second", []),
        "third": ("The third", "speed_third", []),
    }
    monkeypatch.setattr(module, "PARTS", parts)
    return module


def row(what, ratio, holds, **limits):
    limits = {"at_most": None, "at_least": None, **limits}
    return {"what": what, "ratio": ratio, "range": [ratio, ratio], "wall_ratio": ratio, "holds": holds, **limits}


def part(*rows):
    packages = {"torch": "9.1", "timm": "9.2", "transformers": "9.3"}
    return {"environment": {"packages": packages, "hardware": "a machine"}, "rows": list(rows), "seconds": 3.0}


def test_parts_that_are_done_are_not_run_again(speed, monkeypatch, tmp_path):
    ran, failing = [], {"second"}

    def run_part(name, extra, threads):
        ran.append(name)
        note = {"arguments": [*speed.PARTS[name][2], *extra], "seconds": 1.0}
        return {**note, "error": "boom"} if name in failing else {**note, **part(row("r", 1.0, True, at_most=1.1))}

    monkeypatch.setattr(speed, "run_part", run_part)
    options = ["--output", str(tmp_path / "speed.json"), "--jobs", "1"]
    speed.main(options)
    assert ran == ["first", "second", "third"]
    failing.clear()
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["parts"]["second"]["error"] == "boom" and "rows" in written["parts"]["third"]
    speed.main([*options, "--parts", "first", "second"])
    assert ran[3:] == ["second"]  # it had failed
    speed.main([*options, "--parts", "first", "--repeats", "2"])
    assert ran[4:] == ["first"]  # other arguments
    speed.main([*options, "--fresh"])
    assert ran[5:] == ["first", "second", "third"]


@pytest.mark.slow  # two processes that import torch
def test_a_part_runs_as_a_process_and_its_failure_is_noted(load):
    speed = load("speed")
    found = speed.run_part(
        "scale", [*TINY, "--probe_batch", "2", "--peak_batch", "2", "--memory_gb", "0.05"], threads=1
    )
    assert found["parameters"] > 0 and found["seconds"] > 0 and str(TRAINING.parent) not in json.dumps(found)
    text = speed.plan_text(found)
    assert "1 | 0.00" in text and "64 |" in text and "12 * parameters" in text
    assert abs(found["peaks"][0]["error"]) < 0.5 and all(row["error"] > -0.1 for row in found["peaks"])
    wrong = speed.run_part("scale", ["--no_such_argument"], threads=1)
    assert "no_such_argument" in wrong["error"]


def test_both_sections_are_rendered_with_what_was_missed(speed, tmp_path):
    met = row("fast", 0.5, True, at_most=1.1)
    missed, plain = row("slow", 1.2, False, at_least=2.0), row("whatever", 3.0, None)
    results = {"jobs": 2, "parts": {"first": part(met, missed, plain), "second": {"error": "boom"}}}
    files = {name: tmp_path / name for name in ("speed", "speed_parts")}
    for name, path in files.items():
        path.write_text(f"before\n<!-- {name}: begin, made by --render -->\n<!-- {name}: end -->\nafter\n")
    speed.render(results, files["speed"], files["speed_parts"])
    text = files["speed"].read_text()
    assert "1 of 2 targets met. Missed: slow. Not measured: The second; The third." in text
    assert "| The first: fast | 0.50 | 0.50 to 0.50 | <= 1.1 | met |" in text and "whatever" not in text
    assert "| The first: slow | 1.20 | 1.20 to 1.20 | >= 2.0 | **missed** |" in text and "torch 9.1" in text
    parts = files["speed_parts"].read_text()
    assert "whatever" in parts and "not measured: boom" in parts and parts.startswith("before")
    with pytest.raises(ValueError, match="no section 'speed'"):
        speed.render(results, files["speed_parts"], files["speed"])
    with pytest.raises(ValueError, match="no part has a result"):
        speed.render({"jobs": 2, "parts": {"second": {"error": "boom"}}}, files["speed"], files["speed_parts"])


def test_every_part_names_a_script_with_these_arguments(load):
    speed = load("speed")
    for name, (title, script, arguments) in speed.PARTS.items():
        text = (BENCHMARKS / f"{script}.py").read_text()
        text += (BENCHMARKS / "speed_timing.py").read_text() + (BENCHMARKS / "autoattack_parity.py").read_text()
        assert title and name and all(f'"{a}"' in text for a in arguments if a.startswith("--")), script
    assert (TRAINING.parent / speed.PARTS["autoattack"][2][1]).is_dir()


# --- compile ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_changing_groups_do_not_compile_anew_each_time(load, tmp_path):
    options = ["--batch_size", "48", "--backbone", "resnet10t", "--output", str(tmp_path / "compile.json")]
    found = load("speed_compile").main([*TINY, "--num_experts", "2", "--batches", "20", *options])["rows"][0]
    assert found["holds"] and len(found["graphs"]) == len(found["group_sizes"]) == 20
    assert found["graphs"][0] > 0 and found["ratio"] == found["graphs"][-1] - found["graphs"][0]
    assert len({tuple(sizes) for sizes in found["group_sizes"]}) > 10


# --- scale -----------------------------------------------------------------------------------------------------------


def test_fsdp_config_keeps_weights_together_for_the_attack():
    config = load_config_from_file(str(TRAINING / "accelerate_configs" / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_reshard_after_forward"] is False
    assert config.fsdp_config["fsdp_auto_wrap_policy"] == "NO_WRAP"


# --- Square ----------------------------------------------------------------------------------------------------------


def one_after_the_other(attack, model, images, labels):
    """The search as the paper writes it: every query is asked."""
    linf = attack.norm == "linf"
    start, propose = (start_linf, propose_linf) if linf else (start_l2, propose_l2)
    found = images.clone()
    for i in range(len(images)):
        image, label = images[i : i + 1], labels[i : i + 1]
        streams, current, best = _Streams(torch.tensor([i]), attack.seed, images.device), image, -torch.inf
        if logits_of(model, image).argmax() != label:
            continue
        for query in range(attack.queries):
            side = window_size(max(query, 1), attack.queries, images.shape, attack.norm)
            if query == 0:
                proposal = start(image, attack.eps, streams)
            else:
                proposal = propose(image, current, attack.eps, side, streams.draw((2 if linf else 5) + image.shape[1]))
            logits = logits_of(model, proposal)
            margin, wrong = margin_objective(logits, label), bool(logits.argmax() != label)
            if wrong or margin > best:
                current, best = torch.where(per_image(torch.tensor([True]), image), proposal, current), margin
            if wrong:
                break
        found[i] = current[0]
    return found


@pytest.mark.parametrize(
    ("norm", "eps", "shape"), [("linf", 0.02, (1, 5, 6)), ("linf", 0.02, (3, 7, 6)), ("l2", 0.3, (2, 7, 6))]
)
def test_square_finds_what_asking_every_query_finds(norm, eps, shape):
    torch.manual_seed(0)
    size = torch.Size(shape).numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, 12), nn.Tanh(), nn.Linear(12, 4)).double().eval()
    images = torch.rand(7, *shape, dtype=torch.float64)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 4
    attack, counter = Square(eps=eps, norm=norm, queries=700, seed=4), PassCounter(model)
    attacked = attack(counter, images, labels)
    with torch.no_grad():
        expected = one_after_the_other(attack, model, images, labels)
        standing = model(attacked).argmax(dim=1) == labels
    assert torch.equal(attacked, expected) and 0 < standing.sum() < 7
    if norm == "linf" and shape[0] == 1:
        assert counter.forward_rows < 0.6 * 700 * int(standing.sum())
