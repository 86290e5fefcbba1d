"""`import hf_dualmoe` does no work: it is quick and pulls in no dataset, plotting or training machinery of its own."""

import subprocess
import sys

MEASURE = """
import sys, time, torch, timm.models.vision_transformer, transformers.modeling_utils
from transformers import AutoModel, AutoModelForImageClassification, CLIPImageProcessor
start = time.process_time()
import hf_dualmoe
print(time.process_time() - start, *(name for name in sys.modules if name.startswith('hf_dualmoe.')))
"""


def test_import_takes_under_a_second_beyond_its_dependencies_and_opens_the_room_of_the_models_only():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    seconds, *modules = result.stdout.split()
    assert float(seconds) < 1
    assert {name.split(".")[1] for name in modules} == {"models"}
