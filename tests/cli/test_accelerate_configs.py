"""The configurations for `accelerate launch`."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).parents[2] / "training" / "accelerate_configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines >= 1 and config.mixed_precision in ("no", "bf16")


def test_fsdp_config_keeps_weights_together_for_the_attack():
    config = load_config_from_file(str(CONFIGS / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_reshard_after_forward"] is False
    assert config.fsdp_config["fsdp_auto_wrap_policy"] == "NO_WRAP"
