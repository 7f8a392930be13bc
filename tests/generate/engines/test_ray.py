"""The Ray engine's parts without Ray's processes; `test_ray_cluster` has it on a cluster."""

import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.generate.engines.base import Completion, Prompt, Query, Sampling
from pipeline.generate.engines.ray import (
    RayEngine,
    RayOptions,
    RowMaker,
    after,
    before,
    choose_replicas,
    completion_of,
    once,
    split_options,
)
from pipeline.generate.engines.vllm import stop_ids
from pipeline.parallel.ray_cluster import import_ray

# --- rows -----------------------------------------------------------------------------------------------------------


TEXTS = pa.table({"id": ["a", "b", "c"], "text": ["xx", "x", "x" * 6], "number": [5, 3, 4]})


def make(table: pa.Table) -> list[Query]:
    """A token a character; a text of one character is refused."""
    return [
        Query(Prompt(row["id"], [7] * len(row["text"]), 2**62 + 1), {"n": 3}, "short" if row["text"] == "x" else None)
        for row in table.to_pylist()
    ]


def test_texts_become_rows_and_what_no_engine_shall_answer_has_an_error() -> None:
    rows = RowMaker(make, Sampling(5), max_model_len=10)(TEXTS).to_pylist()
    assert [(row["number"], row["tokenized_prompt"]) for row in rows] == [(5, [7, 7]), (3, [7]), (4, [7] * 6)]
    assert [row["__inference_error__"] for row in rows] == [
        "",
        "short",
        "prompt too long: 6 tokens + 5 new ones exceed 10",
    ]
    assert [pickle.loads(row["query"]) for row in rows] == make(TEXTS)


def test_what_an_engine_gets_and_what_is_kept_of_its_answer() -> None:
    row = {"number": 3, "query": pickle.dumps(Query(Prompt("a", [1], 2**62 + 1)))}
    assert before(row, Sampling(5))["sampling_params"] == {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0}
    assert before(row, Sampling(5, 0.5))["sampling_params"]["seed"] == 2**62 + 1
    answered = {**row, "generated_text": "hi", "generated_tokens": [4, 9], "prompt": ""}
    assert after(answered) == {**row, "text": "hi", "tokens": 2, "last": 9}
    assert after(answered | {"generated_tokens": []})["last"] == -1


def test_a_row_that_is_delivered_again_is_passed_over() -> None:
    blocks = [
        pa.table({"number": numbers, "of": [block] * len(numbers)})
        for block, numbers in enumerate([[4, 0], [0, 7], [4, 2]])
    ]
    assert [(row["number"], row["of"]) for row in once(blocks)] == [(4, 0), (0, 0), (7, 1), (2, 2)]


@pytest.mark.parametrize(
    ("tokens", "last", "reason"), [(3, 9, "stop"), (5, 8, "length"), (5, 9, "stop"), (0, -1, "stop")]
)
def test_why_an_answer_ended_follows_from_its_length_and_end(tokens: int, last: int, reason: str) -> None:
    row = {"text": "hi", "tokens": float(tokens), "last": last, "__inference_error__": ""}
    assert completion_of(row, "a", Sampling(5), {9}) == Completion("a", "hi", reason, tokens)  # type: ignore[arg-type]


def test_a_row_with_an_error_keeps_its_first_line() -> None:
    row = {"generated_text": "", "__inference_error__": "ValueError: too long\nmore"}
    assert completion_of(row, "a", Sampling(5), set()) == Completion("a", "", "error", 0, "ValueError: too long")


def test_stop_tokens_of_tokenizer_config_and_generation_config(tiny_backbone: Callable[..., Path]) -> None:
    assert stop_ids(BackboneParams(name=str(tiny_backbone()))) == {2}


# --- options --------------------------------------------------------------------------------------------------------


def test_options_are_ours_or_vllms() -> None:
    ours, arguments = split_options({"replicas": 3, "max_num_seqs": 7})
    assert (ours, arguments) == (RayOptions(replicas=3), {"max_num_seqs": 7})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replicas": "3"}, r"^options: replicas: .*integer"),
        ({"chunk_rows": 0}, r"^options: chunk_rows: .*greater"),
        ({"dtype": "float32"}, r"^options\.dtype: .*follows from dtype"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        split_options(options)


@pytest.mark.filterwarnings("ignore")
def test_an_option_that_neither_knows_suggests_one_of_either(environment: None) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(EngineError, match=r"^options\.replica: .*\(did you mean 'replicas'\?\)"):
        split_options({"replica": 3})
    with pytest.raises(EngineError, match=r"^options\.max_nun_seqs: .*\(did you mean 'max_num_seqs'\?\)"):
        split_options({"max_nun_seqs": 3})


def test_options_of_the_cluster_change_no_fingerprint() -> None:
    speed = RayEngine.SPEED_OPTIONS
    assert {"address", "replicas", "chunk_rows", "num_cpus", "max_num_seqs", "gpu_memory_utilization"} <= speed
    assert "quantization" not in speed


def test_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch, environment: None) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"^ray cannot be imported.*pip install -e \.\[ray\]"):
        import_ray(EngineError)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


# --- engines on a cluster -------------------------------------------------------------------------------------------


def test_as_many_engines_as_the_gpus_allow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_replicas({"GPU": 8, "CPU": 64}, RayOptions(), devices=2) == (4, 4)
    assert "4 to 4 engines (8 GPUs, 2 for an engine)" in caplog.text


def test_one_engine_without_gpus_and_a_pool_between_the_options() -> None:
    assert choose_replicas({"CPU": 6}, RayOptions(), 1) == (1, 1)
    assert choose_replicas({"CPU": 6}, RayOptions(replicas=3), 1) == (3, 3)
    assert choose_replicas({"GPU": 2, "CPU": 64}, RayOptions(min_replicas=1, replicas=16), 1) == (1, 16)
    assert choose_replicas({"CPU": 6}, RayOptions(min_replicas=2), 1) == (2, 2)


@pytest.mark.parametrize(
    ("resources", "options", "devices", "message"),
    [
        (
            {"GPU": 2, "CPU": 64},
            {},
            4,
            r"^options\.min_replicas: 1 engines take 4 GPUs .* has 2 and 64: .*tensor_parallel",
        ),
        ({"CPU": 4}, {"replicas": 2}, 1, r"^options\.min_replicas: 2 engines .* 5 logical CPUs, .* 4: .*num_cpus"),
        ({"CPU": 9}, {"replicas": 2, "min_replicas": 3}, 1, r"^options\.min_replicas: 3, above replicas \(2\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_waits_for_it(
    resources: dict[str, float], options: dict[str, Any], devices: int, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        choose_replicas(resources, RayOptions(**options), devices)
