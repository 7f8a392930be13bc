"""Reading embeddings of held-out queries, on a tiny backbone."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.probes.base import ProbeContext
from pipeline.probes.interpret import InterpretParams, faithfulness, run
from tests.encoder.test_inference import make_encoder
from tests.evaluation_fakes import VectorSystem
from tests.probes.test_alignment import write_heldout


class Lengths(VectorSystem):
    """Embeds any text, by its length."""

    def encode(self, texts: Any, instruction: str, side: str = "query") -> np.ndarray:
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


class OneEncoder:
    """Systems around one tiny encoder."""

    def encoder(self) -> Any:
        return make_encoder()

    def build(self, names: Any) -> Any:
        return (Lengths({}, name) for name in names)


def test_rows_hold_query_response_decoded_text_and_words(workspace: Path) -> None:
    write_heldout()
    context = ProbeContext(OneEncoder(), ["student"], Path(), Path(), 4, "float32")  # type: ignore[arg-type]
    result = run(InterpretParams(queries=2, max_new_tokens=3, vocabulary=4), context)
    rows = result.rows.to_pylist()
    assert [row["query"] for row in rows] == ["apple what?", "bread what?"]
    assert [row["response"] for row in rows] == ["apple", "bread"]
    assert all(len(row["vocabulary"]) == 3 and {len(words) for words in row["vocabulary"]} == {4} for row in rows)
    assert result.metrics["queries"] == 2
    expected = np.mean([row["faithfulness"] for row in rows])
    assert abs(result.metrics["student/faithfulness"] - expected) < 1e-6


def test_faithfulness_is_the_cosine_of_both_texts() -> None:
    teacher = VectorSystem({"a": [1, 0], "b": [1, 1], "": [0, 0]})
    np.testing.assert_allclose(faithfulness(teacher, ["a", "b", ""], ["a", "a", "a"]), [1, 0.5**0.5, 0], atol=1e-6)
