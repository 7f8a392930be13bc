"""From ids and texts to the prompts that an engine gets, and what each stored row says of its prompt."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.backbone.prompting import FormattedPrompt, PromptFormatter
from pipeline.generate.engines.base import Prompt, Query
from pipeline.generate.response_counts import DROPPED


@dataclass(frozen=True)
class QueryMaker:
    """Formats texts; picklable, so it also runs on other machines.

    Attributes:
        formatter: of the backbone.
        seed: each row's seed follows from this and its id.
        drop_too_long: refuse a text that the formatter must cut.
    """

    formatter: PromptFormatter
    seed: int
    drop_too_long: bool = False

    def __call__(self, table: pa.Table) -> list[Query]:
        """The queries of the rows (`id`, `text`), in their order."""
        prompts = self.formatter.batch(table["text"].to_pylist())
        return [self._query(*row) for row in zip(table["id"].to_pylist(), prompts, strict=True)]

    def _query(self, row_id: str, formatted: FormattedPrompt) -> Query:
        columns = {
            "prompt_tokens": len(formatted.token_ids),
            "truncated": formatted.truncated,
            "control_tokens": formatted.control_tokens,
            "prompt_hash": _prompt_hash(formatted.token_ids),
        }
        seed = row_seed(self.seed, row_id)
        prompt = Prompt(row_id, formatted.token_ids, seed, formatted.text, self.formatter.system)
        refused = self.drop_too_long and formatted.truncated
        return Query(prompt, columns, f"{DROPPED}: longer than max_prompt_tokens" if refused else None)


def _prompt_hash(token_ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.sha256(array("q", token_ids).tobytes()).digest()[:8]) >> 1


def row_seed(seed: int, row_id: str) -> int:
    """The sampling seed of one row, below 2**63: the same in every batch and every run."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:8]) >> 1
