"""The Ray engine: its parts without Ray's processes, and (marker models) a local Ray with real engines."""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.artifacts import open_artifact
from pipeline.core.errors import EngineError
from pipeline.generate.engines.base import Completion, Prompt, Sampling
from pipeline.generate.engines.ray import RayEngine, completion, last_error, row_of, stop_ids
from pipeline.generate.engines.ray_cluster import (
    Layout,
    RayOptions,
    choose_layout,
    engine_arguments,
    engine_environment,
    enough_cpus,
    import_ray,
    processor_config,
    split_options,
)
from pipeline.generate.engines.registry import build_engine
from tests.generate.engines.conftest import GREEDY, SIZES, agree
from tests.stage_runs import finish, kept_rows, start, wait_until, write_params, write_queries

BACKBONE = BackboneParams(name="org/model", revision="abc", dtype="float32")
CPU = Layout(on_gpu=False, devices=1, replicas=2, sequences=8, chunk_rows=4)


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_prompt_as_a_row() -> None:
    row = row_of(Prompt("a", [1, 2], 77), 3, Sampling(5))
    assert json.loads(row.pop("sampling")) == {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0}
    assert row == {"id": "a", "chunk": 3, "tokenized_prompt": [1, 2]}
    assert json.loads(row_of(Prompt("a", [1], 2**62 + 1), 0, Sampling(5, 0.5))["sampling"])["seed"] == 2**62 + 1


@pytest.mark.parametrize(
    ("tokens", "last", "reason"), [(3, 9, "stop"), (5, 8, "length"), (5, 9, "stop"), (0, -1, "stop")]
)
def test_why_an_answer_ended_follows_from_its_length_and_end(tokens: int, last: int, reason: str) -> None:
    row = {"id": "a", "text": "hi", "tokens": tokens, "last": last, "__inference_error__": ""}
    assert completion(row, Sampling(5), {9}) == Completion("a", "hi", reason, tokens)  # type: ignore[arg-type]


def test_a_row_with_an_error_keeps_its_first_line() -> None:
    row = {"id": "a", "generated_text": "", "__inference_error__": "ValueError: too long\nmore"}
    assert completion(row, Sampling(5), set()) == Completion("a", "", "error", 0, "ValueError: too long")


def test_a_chunk_has_all_its_rows_and_more_bytes_than_a_block() -> None:
    feed = pytest.importorskip("pipeline.generate.engines.ray_feed")
    limit = feed.block_bytes(8, 40)
    for count, tokens in ((1, 1), (5, 40), (8, 40)):
        rows = [row_of(Prompt(f"{i:032d}", [7] * tokens, i), 2, Sampling(5)) for i in range(count)]
        table = feed.chunk_table(rows, 8, limit)
        assert table.num_rows == 8
        assert limit < table.nbytes < 1.5 * limit  # from there on Ray Data would cut it
        assert table["id"].to_pylist() == [row["id"] for row in rows] + [""] * (8 - count)
        assert [bool(error) for error in table["__inference_error__"].to_pylist()] == [False] * count + [True] * (
            8 - count
        )
        assert len(set(table["sampling"].to_pylist())) == 1
        assert table["tokenized_prompt"].to_pylist()[0] == [7] * tokens


def test_the_feed_keeps_a_chunk_until_it_is_answered() -> None:
    feed = pytest.importorskip("pipeline.generate.engines.ray_feed")

    async def run() -> list[Any]:
        actor = feed.Feed()
        waiting = asyncio.create_task(actor.get(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        await actor.put(1, "rows")
        first = [await waiting, await actor.get(1)]
        await actor.answered(1)
        return [*first, (await actor.get(1)).num_rows]

    assert asyncio.run(run()) == ["rows", "rows", 0]


def test_what_comes_back_of_a_row() -> None:
    feed = pytest.importorskip("pipeline.generate.engines.ray_feed")
    sent = {"id": "a", "filler": b"0", "sampling": '{"seed": 4611686018427387905}'}
    assert feed.before(sent) == {"id": "a", "sampling_params": {"seed": 2**62 + 1}}
    row = {"id": "a", "chunk": 1, "generated_text": "hi", "generated_tokens": [4, 9], "prompt": ""}
    assert feed.after(row) == {"id": "a", "chunk": 1, "text": "hi", "tokens": 2, "last": 9}
    assert feed.after(row | {"generated_tokens": []})["last"] == -1


def test_stop_tokens_of_tokenizer_config_and_generation_config(tiny_backbone: Callable[..., Path]) -> None:
    assert stop_ids(BackboneParams(name=str(tiny_backbone()))) == {2}


def test_the_innermost_error_of_a_traceback() -> None:
    message = (
        "The actor died\n  File 'x'\nValueError: first\n\n  File 'y'\n"
        "pydantic_core.ValidationError: 1 error\n  bad value\nmore"
    )
    assert last_error(RuntimeError(message)) == "pydantic_core.ValidationError: 1 error bad value"
    assert last_error(RuntimeError("no more\nat all")) == "RuntimeError: no more"


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
    with pytest.raises(EngineError, match=r"ray cannot be imported.*pip install -e \.\[ray\]"):
        import_ray()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


# --- layout ---------------------------------------------------------------------------------------------------------


def test_as_many_engines_as_the_gpus_allow(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        layout = choose_layout({"GPU": 8, "CPU": 64}, RayOptions(chunk_rows=32), {"tensor_parallel_size": 2})
    assert (layout.on_gpu, layout.devices, layout.replicas) == (True, 2, 4)
    assert "replicas = 4 (8 GPUs, 2 for an engine)" in caplog.text
    assert layout.chunks_at_once == 2 * layout.sequences // 32
    assert layout.window_rows == 4 * (layout.chunks_at_once + 2) * 32


def test_one_engine_without_gpus_and_the_options_over_the_automatic_choices() -> None:
    layout = choose_layout({"CPU": 6}, RayOptions(), {"max_num_seqs": 5})
    assert (layout.on_gpu, layout.replicas, layout.sequences, layout.chunks_at_once) == (False, 1, 5, 2)
    assert choose_layout({"CPU": 6}, RayOptions(replicas=3), {}).replicas == 3


def test_what_does_not_fit_is_refused_before_ray_waits_for_it() -> None:
    with pytest.raises(EngineError, match=r"^tensor_parallel: .*4 GPUs, the Ray cluster has 2"):
        choose_layout({"GPU": 2, "CPU": 64}, RayOptions(), {"tensor_parallel_size": 4})
    with pytest.raises(EngineError, match=r"^options\.replicas: Ray has 4 logical CPUs, 2 engines need 5: .*num_cpus"):
        choose_layout({"CPU": 4}, RayOptions(replicas=2), {})
    assert enough_cpus(RayOptions(replicas=500)) == 503


def test_arguments_of_an_engine_on_a_cpu_and_on_a_gpu() -> None:
    arguments = engine_arguments(BACKBONE, 96, CPU, {"max_num_seqs": 8, "enforce_eager": False})
    assert (arguments["max_num_seqs"], arguments["enforce_eager"]) == (8, False)
    assert (arguments["revision"], arguments["dtype"], arguments["max_model_len"]) == ("abc", "float32", 96)
    gpu = engine_arguments(BACKBONE, 96, Layout(True, 1, 1, 8, 4), {})
    assert not {"enforce_eager", "kv_cache_memory_bytes"} & gpu.keys()


def test_environment_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    variables = engine_environment(CPU)
    assert int(variables["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert (variables["HF_HUB_OFFLINE"], variables["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    assert "HF_TOKEN" not in variables  # Ray shows the variables of an actor to everyone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_configuration_that_ray_gets(environment: None) -> None:
    pytest.importorskip("vllm")
    import_ray()
    layout = Layout(on_gpu=True, devices=2, replicas=3, sequences=8, chunk_rows=4)
    config = processor_config(BACKBONE, 96, layout, RayOptions(env={"A": "b"}), {"tensor_parallel_size": 2})
    assert (config.concurrency, config.batch_size, config.max_concurrent_batches) == ((3, 3), 4, 4)
    assert [bundle["GPU"] for bundle in config.placement_group_config["bundles"]] == [1, 1]
    assert config.should_continue_on_error
    assert config.runtime_env["env_vars"]["A"] == "b"


# --- the real thing -------------------------------------------------------------------------------------------------

OPTIONS = {"chunk_rows": 4, "max_num_seqs": 8, "kv_cache_memory_bytes": 2**28}


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_local_ray_beside_transformers(
    small_lm: Path, questions: list[Prompt], by_transformers: dict[str, Completion], environment: None
) -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("ray")
    bad = [Prompt("long", [100] * 90, 0), Prompt("stranger", [1, 10**6], 0)]
    handler = signal.getsignal(signal.SIGTERM)
    with closing(build_engine("ray", BackboneParams(name=str(small_lm)), **SIZES, options=OPTIONS)) as engine:
        assert signal.getsignal(signal.SIGTERM) is handler
        found = list(engine.generate(iter([*bad, *questions]), GREEDY))
        began = time.monotonic()
        again = list(engine.generate(iter(questions[:1]), GREEDY))
        assert time.monotonic() - began < 15  # the engines are still up
        warm = Sampling(8, temperature=1.0)
        sampled = [{c.id: c for c in engine.generate(order, warm)} for order in (questions, questions[::-1])]
    assert not [name for name in alive(descendants(os.getpid())) if "ray" in name or "VLLM" in name]
    rows = {answer.id: answer for answer in found}
    assert len(found) == len(rows) == len(questions) + 2
    assert "prompt too long: 90 tokens + 16 new ones exceed 96" in str(rows["long"].error)
    assert rows["stranger"].finish_reason == "error"
    assert agree(rows, by_transformers)
    assert [answer.id for answer in again] == ["q0"]
    assert agree(*sampled)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[str]:
    return [p.name() for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.models
@pytest.mark.slow
def test_the_stage_killed_and_run_again(small_lm: Path, workspace: Path) -> None:
    pytest.importorskip("vllm")
    pytest.importorskip("ray")
    texts = [f"Say something about the number {index}." for index in range(120)]
    write_queries(texts)
    write_params(
        backbone={"name": str(small_lm), "dtype": "float32"},
        generate={
            "engine": "ray",
            "dtype": "float32",
            "max_new_tokens": 12,
            "max_prompt_tokens": 80,
            "options": OPTIONS,
        },
    )
    process = start("generate")
    wait_until(lambda: kept_rows("generate") > 0, process, seconds=180)
    started = descendants(process.pid)
    assert len(alive(started)) > 3
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = kept_rows("generate")
    assert 0 < kept < len(texts)
    deadline = time.monotonic() + 20
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(started)

    stderr = finish("generate")
    assert "Traceback" not in stderr
    facts = json.loads(Path("results/generate.json").read_text())
    assert (facts["reused_rows"], facts["computed_rows"]) == (kept, len(texts) - kept)
    table = open_artifact(Path("data/responses"), "responses").read()
    assert table.num_rows == len(set(table["id"].to_pylist())) == len(texts)
    assert set(table["finish_reason"].to_pylist()) <= {"stop", "length"}
