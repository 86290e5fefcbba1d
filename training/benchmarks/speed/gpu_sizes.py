"""What gpu.py times, and at which sizes: those of a GPU, and tiny ones to rehearse on a CPU."""

from dataclasses import dataclass, field
from typing import Any

from hf_dualmoe.trainer.time_estimate import Effort

PROFILED = 5  # steps under the profiler
EAGER_EFFORT, GRAPH_EFFORT = Effort(warmup=4, block=3, blocks=2), Effort(warmup=12, block=10, blocks=3)
SINGLE, THIN = "cifar10_resnet18_single", "cifar10_resnet18"
HEADS = {"shared_stages": 4, "width": "64,128,256,512"}


@dataclass(frozen=True)
class Size:
    """How large the work is.

    Args:
        device: Type of the device.
        image_size: Side in pixels.
        images: Images in the random data set.
        divisor: Of batch sizes and of attack steps.
        width: Setting `width` of all models; None = that of the recipe.
        eager, graph: Steps that are timed without and with the step graph.
        profiled: Steps under the profiler.
    """

    device: str
    image_size: int = 32
    images: int = 20_000
    divisor: int = 1
    width: str | None = None
    eager: Effort = EAGER_EFFORT
    graph: Effort = GRAPH_EFFORT
    profiled: int = PROFILED

    def batch(self, batch: int) -> int:
        """A batch size at this size of the work."""
        return max(2, batch // self.divisor)

    def steps(self, steps: int) -> int:
        """Attack steps at this size of the work."""
        return max(1, steps // self.divisor)


REHEARSAL = Size("cpu", 8, 40, divisor=64, width="4,4,4,8", eager=Effort(1, 1, 1), graph=Effort(1, 1, 1), profiled=1)


@dataclass(frozen=True)
class Case:
    """A training step that is timed.

    Args:
        title: Row of the table.
        recipe: Of training/recipes.
        batch: Images per step.
        settings: What differs from the recipe.
        target_ms: The aim for a step with the graph on one H100; None = there is none.
    """

    title: str
    recipe: str
    batch: int
    settings: dict[str, Any] = field(default_factory=dict)
    target_ms: float | None = None


NFGSM = {"training_attack": "nfgsm"}
CASES = {
    "single PGD-10, 128": Case("one ResNet18, PGD-10", SINGLE, 128, target_ms=28),
    "single PGD-10, 512": Case("one ResNet18, PGD-10", SINGLE, 512, target_ms=75),
    "jtdmoe thin PGD-10, 128": Case("JTDMoE, thin experts, PGD-10", THIN, 128, target_ms=90),
    "single N-FGSM, 512": Case("one ResNet18, N-FGSM", SINGLE, 512, NFGSM, target_ms=20),
    "single N-FGSM, 256": Case("one ResNet18, N-FGSM", SINGLE, 256, NFGSM),
    "single standard, 256": Case("one ResNet18, no attack", SINGLE, 256, {"method": "standard"}),
    "rt_er thin N-FGSM, 256": Case("RT-ER, thin experts, N-FGSM", THIN, 256, {**NFGSM, "method": "rt_er"}),
    "jtdmoe heads N-FGSM, 256": Case("JTDMoE, heads, N-FGSM", THIN, 256, {**NFGSM, **HEADS}),
}
