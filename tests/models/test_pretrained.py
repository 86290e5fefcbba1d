"""What saving and pushing do beyond transformers: the code of a sharded model, and a publisher of the package."""

import json

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_dualmoe import MoEForImageClassification
from hf_dualmoe.models.pretrained_dualmoe import RobustPreTrainedModel


@pytest.fixture
def sent(monkeypatch):
    """What a publisher was asked to send, instead of the package's own."""
    calls = []
    monkeypatch.setattr(RobustPreTrainedModel, "_publish", None)
    RobustPreTrainedModel.register_publisher(lambda *call, **options: calls.append((*call, options)))
    return calls


def test_a_push_is_the_work_of_the_publisher(resnet_moe, sent):
    resnet_moe.push_to_hub("user/name", private=True, license="mit")
    assert sent == [(resnet_moe, "user/name", {"private": True, "license": "mit"})]


def test_saving_can_push(resnet_moe, sent, tmp_path):
    folder = tmp_path / "name-of-folder"
    resnet_moe.save_pretrained(folder, push_to_hub=True, commit_message="First", token="hf_x", revision="trial")
    resnet_moe.save_pretrained(folder, push_to_hub=True, is_main_process=False)
    resnet_moe.save_pretrained(folder, push_to_hub=True, repo_id="user/other", private=True, create_pr=True)
    given = [(repo_id, {name: value for name, value in options.items() if value}) for _, repo_id, options in sent]
    assert given == [
        ("name-of-folder", {"commit_message": "First", "token": "hf_x", "revision": "trial"}),
        ("user/other", {"private": True, "create_pr": True}),
    ]


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_model_that_is_spread_over_processes_saves_its_own_code(resnet_moe, one_process, tmp_path):
    """`fully_shard` makes a class of its own, in a module of torch."""
    resnet_moe.save_pretrained(tmp_path / "whole")
    fully_shard(resnet_moe, mesh=one_process)
    tensors = resnet_moe.state_dict().items()
    weights = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors}
    resnet_moe.save_pretrained(tmp_path / "sharded", state_dict=weights)
    whole, sharded = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "sharded"))
    assert sharded == whole
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "sharded")]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    loaded = MoEForImageClassification.from_pretrained(tmp_path / "sharded")
    assert type(loaded) is MoEForImageClassification
