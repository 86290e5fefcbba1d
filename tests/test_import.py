"""`import hf_dualmoe` does no work: it is quick and pulls in no dataset, plotting or training machinery of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import hf_dualmoe

MEASURE = """
import time, torch, timm.models.vision_transformer, transformers.modeling_utils
from transformers import AutoModel, AutoModelForImageClassification, CLIPImageProcessor
start = time.perf_counter()
import hf_dualmoe
print(time.perf_counter() - start)
"""


def test_import_takes_under_a_second_beyond_its_dependencies():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1


def test_package_root_imports_configuration_and_models_only():
    tree = ast.parse(Path(hf_dualmoe.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"transformers", "configuration_dualmoe", "modeling_dualmoe", "hub"}  # hub: in push_to_hub
