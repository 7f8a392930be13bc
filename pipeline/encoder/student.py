"""The trained parameters: rows of the new tokens and two linear layers (paper, section on the method).

Shapes: B texts, T thought tokens, n compression tokens, d hidden size of the backbone, e width of the embedding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbone.output_head import at_least_float32
from pipeline.encoder.token_init import TokenInit, vocabulary_rows


class Student(nn.Module):
    """New tokens `[T + n, d]`, a reconstruction projection d -> d and an alignment projection d -> e, in float32.

    The thought tokens stand before the compression tokens; only the latter are read out. Where an embedding is made of
    another mean than that over them (`train.pool`), it stands in front of their states.
    """

    def __init__(self, hidden: int, width: int, compression_tokens: int, thought_tokens: int = 0) -> None:
        """Projections are initialised as torch does; the token rows are zero."""
        super().__init__()
        self.compression_tokens = compression_tokens
        self.thought_tokens = thought_tokens
        self.tokens = nn.Parameter(torch.zeros(thought_tokens + compression_tokens, hidden))
        self.reconstruction = nn.Linear(hidden, hidden)
        self.alignment = nn.Linear(hidden, width)

    @property
    def hidden(self) -> int:
        return self.tokens.shape[1]

    @property
    def width(self) -> int:
        return self.alignment.out_features

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Soft prompts `[B, n, d]` and embeddings `[B, e]` of states `[B, n, d]` or, with a mean in front, one more."""
        mapped = self.soft_prompts(states)
        pooled = mapped.shape[1] - self.compression_tokens
        return mapped[:, pooled:], self.embedding(mapped[:, :pooled] if pooled else mapped)

    def feature(self, states: Tensor) -> Tensor:
        """What an embedding is made of, `[B, d]`: the mean in front of states, or that over the compression tokens."""
        pooled = states.shape[1] - self.compression_tokens
        return (states[:, :pooled] if pooled else states).float().mean(dim=1)

    def soft_prompts(self, hidden: Tensor) -> Tensor:
        """Soft prompts `[B, n, d]` of the final-normed hidden states `[B, n, d]` at the compression tokens."""
        return self.reconstruction(at_least_float32(hidden))

    def embedding(self, soft_prompts: Tensor) -> Tensor:
        """Embeddings `[B, e]`: the alignment projection of each soft prompt, mean over the n tokens."""
        return self.alignment(soft_prompts).mean(dim=1)


def new_student(
    backbone: Any,
    width: int,
    *,
    compression_tokens: int,
    thought_tokens: int,
    seed: int,
    start: TokenInit = vocabulary_rows,
) -> Student:
    """A student for `backbone`: random projections as in the paper, and token rows by `start`."""
    embeddings = backbone.get_input_embeddings()
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    student = Student(embeddings.weight.shape[1], width, compression_tokens, thought_tokens)
    torch.random.set_rng_state(generator_state)
    student = student.to(embeddings.weight.device)
    with torch.no_grad():
        student.tokens.copy_(start(embeddings, len(student.tokens), seed))
    return student


@torch.no_grad()
def input_embeddings(backbone: Any) -> Tensor:
    """`[V, d]`: every vocabulary row as the first layer sees it."""
    embeddings = backbone.get_input_embeddings()
    # Called, not read from .weight: some architectures (Gemma) scale the rows.
    return embeddings(torch.arange(embeddings.weight.shape[0], device=embeddings.weight.device))
