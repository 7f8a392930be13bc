"""How fast a run went and how much GPU memory it took: for the record, never for an artifact."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.backbone.sizes import ModelSizes
from pipeline.optim.flops import step_flops


@dataclass
class Throughput:
    """Work since a run began, of all its processes.

    Attributes:
        shape: of the backbone; None: operations are not counted.
        width: of the embedding.
        compression_tokens: of the student.
        thought_tokens: of the student.
        adapter_parameters: of LoRA.
    """

    shape: ModelSizes | None
    width: int
    compression_tokens: int
    thought_tokens: int
    adapter_parameters: int = 0
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    flops: float = 0.0

    def count(self, lengths: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step over rows of so many query and response tokens."""
        self.seconds += seconds
        self.steps += 1
        self.tokens += sum(query + response for query, response in lengths)
        if self.shape is not None:
            self.flops += step_flops(
                self.shape,
                lengths,
                compression_tokens=self.compression_tokens,
                thought_tokens=self.thought_tokens,
                width=self.width,
                adapter_parameters=self.adapter_parameters,
            )

    def summary(self, processes: int) -> dict[str, Any]:
        """Tokens of queries and responses, seconds a step, tokens a second, operations, peak GPU memory here.

        `model_tflops` is per process; divided by what the GPU's data sheet promises it is the model FLOPs utilisation.
        Empty where this run took no step.
        """
        if not self.steps:
            return {}
        facts: dict[str, Any] = {
            "tokens": self.tokens,
            "seconds_per_step": round(self.seconds / self.steps, 4),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }
        if self.shape is not None:
            facts["model_tflops"] = float(f"{self.flops / self.seconds / processes / 1e12:.4g}")
        return facts | _gpu_memory()


def _gpu_memory() -> dict[str, int]:
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"peak_gpu_memory_mib": torch.cuda.max_memory_allocated() // 2**20}
