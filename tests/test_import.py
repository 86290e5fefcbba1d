"""`import hf_dualmoe` does no work: it is quick and pulls in no dataset, plotting or training machinery of its own."""

import subprocess
import sys

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


def test_importing_the_package_opens_the_room_of_the_models_only():
    code = "import sys, hf_dualmoe; print(*sorted(name for name in sys.modules if name.startswith('hf_dualmoe.')))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[1] for name in result.stdout.split()} == {"models"}
