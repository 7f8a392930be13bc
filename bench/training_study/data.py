"""What the study looks at: rows of a workspace, STSBenchmark, cached hidden states, and scores of embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import BACKBONE

WORDS = "In short, the answer to this is mostly about"
MAX_QUERY_TOKENS, MAX_RESPONSE_TOKENS = 320, 64
_BATCH = 32
_RESAMPLES = 200


@dataclass(frozen=True)
class Part:
    """Rows in the order of their ids: queries, answers, whether the backbone ended them itself, targets `[N, e]`."""

    name: str
    queries: list[str]
    responses: list[str]
    finished: list[bool]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.queries)


def read_part(workspace: Path, name: str) -> Part:
    """The rows of `train` or `heldout` of a workspace whose data stages ran."""
    from pipeline.core.artifacts import open_artifact
    from pipeline.core.paths import QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR
    from pipeline.core.vectors import matrix
    from pipeline.train.data import join

    queries, responses, targets = (
        open_artifact(workspace / path, path.name) for path in (QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR)
    )
    table = join(queries.read(f"{name}.parquet"), responses.read(), targets.read()).sort_by("id")
    finished = [reason == "stop" for reason in table["finish_reason"].to_pylist()]
    texts, answers = table["text"].to_pylist(), table["response"].to_pylist()
    return Part(name, texts, answers, finished, np.array(matrix(table["embedding"])))


@dataclass(frozen=True)
class Pairs:
    """STSBenchmark: each different sentence once, the pairs as numbers of sentences `[P, 2]`, gold scores `[P]`."""

    sentences: list[str]
    pairs: np.ndarray
    gold: np.ndarray


def read_pairs(path: Path) -> Pairs:
    """A table with the columns sentence1, sentence2 and score."""
    import pyarrow.parquet as pq

    columns = pq.read_table(path).to_pydict()
    first, second = columns["sentence1"], columns["sentence2"]
    sentences = sorted({*first, *second})
    number = {sentence: at for at, sentence in enumerate(sentences)}
    pairs = [(number[one], number[other]) for one, other in zip(first, second, strict=True)]
    return Pairs(sentences, np.array(pairs), np.array(columns["score"], dtype=np.float64))


class HiddenStates:
    """Hidden states at new tokens, computed once and kept in files.

    Attention is causal, and a draw of n vocabulary rows begins with the draw of fewer. So one pass with 20 tokens holds
    the passes with 1, 5 and 10, and, read from the 11th on, the one with 10 thought tokens before 10 that are read.
    """

    def __init__(self, backbone: Any, tokenizer: Any, cache: Path) -> None:
        """Files go to `cache`, which belongs to one set of data and one backbone."""
        from pipeline.encoder.passes.select import make_passes

        self.backbone, self.tokenizer, self._cache = backbone, tokenizer, cache
        self.passes = make_passes(backbone)
        cache.mkdir(parents=True, exist_ok=True)

    def rows(self, start: str, count: int, seed: int) -> Any:
        """The token rows `[count, d]` of a start."""
        from pipeline.encoder.token_init import token_init

        words = WORDS if start == "words" else None
        return token_init(start, words, self.tokenizer)(self.backbone.get_input_embeddings(), count, seed)  # type: ignore[arg-type]

    def prompts(self, template: str, texts: Sequence[str]) -> list[list[int]]:
        """Prompt token ids."""
        from pipeline.backbone.prompting import PromptFormatter

        formatter = PromptFormatter(self.tokenizer, template, MAX_QUERY_TOKENS)  # type: ignore[arg-type]
        return [prompt.token_ids for prompt in formatter.batch(list(texts))]

    def __call__(
        self, part: str, texts: Sequence[str], template: str, start: str = "vocabulary", count: int = 20, seed: int = 0
    ) -> np.ndarray:
        """float32 `[N, count, d]`; `part` names the texts."""
        file = self._cache / f"{template}-{start}-{count}-{seed}-{part}.npy"
        if not file.exists():
            hidden = self.compute(self.prompts(template, texts), self.rows(start, count, seed))
            np.save(file.with_suffix(".tmp.npy"), hidden)
            file.with_suffix(".tmp.npy").rename(file)
        return np.load(file, mmap_mode="r")

    def compute(self, prompts: Sequence[Sequence[int]], tokens: Any) -> np.ndarray:
        """Of prompts with these token rows, read at all of them."""
        import torch

        from pipeline.core.run import progress

        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        result = np.empty((len(prompts), *tokens.shape), dtype=np.float32)
        starts = range(0, len(order), _BATCH)
        with torch.inference_mode():
            for first in progress(starts, total=len(starts), desc="hidden states", unit="batch"):
                at = order[first : first + _BATCH]
                result[at] = self.passes.query_pass([prompts[row] for row in at], tokens, len(tokens)).cpu().numpy()
        return result


@dataclass(frozen=True)
class Scores:
    """Of held-out rows `[N]`: cosine to the own target and reciprocal rank among all; of STS: Spearman, its error."""

    cosines: np.ndarray
    reciprocal_ranks: np.ndarray
    sts: float | None = None
    sts_error: float | None = None

    def line(self) -> dict[str, float | None]:
        """For a table; errors are standard errors over held-out rows, of STS over pairs (bootstrap)."""
        tops = self.reciprocal_ranks == 1.0
        return {
            "cosine": round(float(self.cosines.mean()), 4),
            "top-1": round(float(tops.mean()), 4),
            "± top-1": round(_error(tops), 4),
            "MRR": round(float(self.reciprocal_ranks.mean()), 4),
            "± MRR": round(_error(self.reciprocal_ranks), 4),
            "STS": None if self.sts is None else round(self.sts, 4),
            "± STS": None if self.sts_error is None else round(self.sts_error, 4),
        }

    def beside(self, base: "Scores") -> dict[str, float]:
        """Difference of MRR from a base, row by row, and its standard error."""
        difference = self.reciprocal_ranks - base.reciprocal_ranks
        return {"MRR - base": round(float(difference.mean()), 4), "± of it": round(_error(difference), 4)}


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def score(embeddings: np.ndarray, targets: np.ndarray) -> Scores:
    """Held-out rows; every target is a candidate for every embedding."""
    from pipeline.core.vectors import unit_rows

    cosines = unit_rows(embeddings) @ unit_rows(targets).T
    own = np.diagonal(cosines)
    return Scores(own, 1.0 / (cosines >= own[:, None]).sum(axis=1))


def score_with_sts(heldout: np.ndarray, targets: np.ndarray, sentences: np.ndarray, pairs: Pairs) -> Scores:
    """Held-out rows and STSBenchmark, whose error is that of resampled pairs."""
    from scipy.stats import spearmanr

    from pipeline.core.vectors import unit_rows

    plain = score(heldout, targets)
    first, second = (unit_rows(sentences)[pairs.pairs[:, side]] for side in (0, 1))
    similar = (first * second).sum(1)
    generator = np.random.default_rng(0)
    draws = (generator.integers(0, len(similar), len(similar)) for _ in range(_RESAMPLES))
    error = float(np.std([spearmanr(similar[at], pairs.gold[at]).statistic for at in draws]))
    return Scores(plain.cosines, plain.reciprocal_ranks, float(spearmanr(similar, pairs.gold).statistic), error)


def cached(cache: Path, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that is computed once."""
    file = cache / f"{name}.npy"
    if not file.exists():
        np.save(file.with_suffix(".tmp.npy"), compute())
        file.with_suffix(".tmp.npy").rename(file)
    return np.load(file)


def load_backbone_and_tokenizer() -> tuple[Any, Any]:
    """SmolLM2-135M in fp32."""
    from pipeline.backbone.loading import BackboneParams, load_backbone, load_tokenizer

    params = BackboneParams(name=str(BACKBONE), dtype="float32")
    return load_backbone(params), load_tokenizer(params)
