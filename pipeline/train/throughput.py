"""How fast a run went and how much GPU memory it took: for the record, never for an artifact."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Query tokens and response tokens of each row.
Lengths = Sequence[tuple[int, int]]


@dataclass
class Throughput:
    """Work of all processes since a run began.

    Attributes:
        step_flops: operations of a step over rows of these lengths; None: operations are not counted.
    """

    step_flops: Callable[[Lengths], int] | None = None
    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0

    def count(self, lengths: Lengths, seconds: float) -> None:
        """Add a step."""
        self.seconds += seconds
        self.steps += 1
        self.rows += len(lengths)
        self.tokens += sum(query + response for query, response in lengths)
        if self.step_flops is not None:
            self.flops += self.step_flops(lengths)

    @property
    def tokens_per_second(self) -> float:
        """Of queries and responses; 0 before the first step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self, processes: int) -> dict[str, Any]:
        """Tokens of queries and responses, seconds a step, tokens a second, operations, peak GPU memory here.

        `model_tflops` is per process; divided by what the GPU's data sheet promises it is the model FLOPs utilisation.
        Empty where this run took no step.
        """
        import torch

        if not self.steps:
            return {}
        facts: dict[str, Any] = {
            "tokens": self.tokens,
            "seconds_per_step": round(self.seconds / self.steps, 4),
            "tokens_per_second": round(self.tokens_per_second, 1),
        }
        if self.step_flops is not None:
            facts["model_tflops"] = float(f"{self.flops / self.seconds / processes / 1e12:.4g}")
        if torch.cuda.is_available():
            facts["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        return facts
