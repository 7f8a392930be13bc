"""The generate stage as a user runs it: whole, killed, interrupted, grown, and with what it cannot use."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner, Result

from pipeline.core.artifacts import open_artifact
from pipeline.core.paths import RESPONSES_DIR
from pipeline.core.schemas import RESPONSES, check_table, responses_schema
from pipeline.generate.__main__ import app
from tests.stage_runs import (
    finish,
    folder_bytes,
    foreign_lines,
    kept_rows,
    killed,
    row_id,
    shards,
    start,
    wait_until,
    write_params,
    write_queries,
)

TEXTS = [f"question number {index}" for index in range(1100)]
GENERATE = {"engine": "echo", "dtype": "float32", "max_new_tokens": 32, "max_prompt_tokens": 40}


@pytest.fixture
def configure(workspace: Path, tiny_backbone: Callable[..., Path]) -> Callable[..., None]:
    """Write params.yaml with these keys of `generate`."""
    default = tiny_backbone("llama")

    def write(backbone: Path | str = default, **keys: Any) -> None:
        write_params(backbone={"name": str(backbone), "dtype": "float32"}, generate=GENERATE | keys)

    return write


Configure = Callable[..., None]


def invoke() -> Result:
    return CliRunner().invoke(app, [])


def facts() -> dict[str, Any]:
    return json.loads(Path("results/generate.json").read_text())


def fails(message: str) -> None:
    result = invoke()
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not RESPONSES_DIR.exists()


def test_one_response_a_query_of_both_splits(configure: Configure) -> None:
    configure()
    write_queries([*TEXTS[:30], "a long one " * 20])
    assert invoke().exit_code == 0
    artifact = open_artifact(RESPONSES_DIR, "responses")
    table = artifact.read()
    check_table(table, RESPONSES, "responses")
    queries = open_artifact(Path("data/queries"), "queries")
    assert table["id"].to_pylist() == sorted(queries.read(columns=["id"])["id"].to_pylist())
    assert artifact.manifest.rows == table.num_rows == queries.manifest.rows == 31
    answers = dict(zip(table["id"].to_pylist(), table["response"].to_pylist(), strict=True))
    assert answers[row_id(TEXTS[7])] == "stub answer: question number 7"


def test_live_progress_leaves_the_responses_as_they_are(configure: Configure) -> None:
    configure()
    write_queries(TEXTS[:30])
    assert invoke().exit_code == 0
    plain = folder_bytes(RESPONSES_DIR)
    shutil.rmtree(".work")
    configure(track="dvclive")
    assert invoke().exit_code == 0
    assert folder_bytes(RESPONSES_DIR) == plain
    live = json.loads(Path("results/live/generate/metrics.json").read_text())
    assert (live["rows"], live["progress"], live["step"]) == (30, 1.0, 30)
    assert live["tokens_per_second"] > 0


def test_manifest_and_record_say_what_made_the_rows(configure: Configure) -> None:
    configure(options={"delay": 0.001}, max_failed_fraction=0.5)
    write_queries([*TEXTS[:30], "a long one " * 20])
    assert invoke().exit_code == 0
    manifest = open_artifact(RESPONSES_DIR, "responses").manifest
    counts = {
        "finish_reason": {"stop": 30, "length": 1, "error": 0},
        "empty_responses": 0,
        "equal_responses": 0,
        "left_thinking": 0,
        "equal_prompts": 0,
        "truncated_prompts": 1,
        "control_token_prompts": 0,
        "stripped_thinking": 0,
        "repetition_loops": 0,
        "errors": {},
    }
    assert manifest.counts == counts
    assert set(manifest.inputs) == {"data/queries"}
    assert set(manifest.models["backbone"]) == {"name", "sha256"}
    assert manifest.params["generate"]["stub"] is True
    assert manifest.params["generate"]["options"] == {}
    assert "max_failed_fraction" not in manifest.params["generate"]
    record = facts()
    assert record["counts"] == counts
    assert record["stub"] == "answers are the prompts themselves"
    assert record["computed_rows"] == 31
    assert record["response_tokens_per_second"] > 0
    assert sum(record["histograms"]["response_tokens"].values()) == 31
    assert record["gpu_memory_mib"] == {}


def test_transformers_engine_writes_real_rows(configure: Configure) -> None:
    configure(engine="transformers", max_new_tokens=5, gates={"equal": 1.0})  # random weights repeat themselves
    write_queries(TEXTS[:5])
    assert invoke().exit_code == 0
    table = open_artifact(RESPONSES_DIR, "responses").read()
    assert table.num_rows == 5
    assert all(1 <= count <= 5 for count in table["response_tokens"].to_pylist())
    assert "stub" not in facts()


def test_a_grown_corpus_computes_only_its_new_rows(configure: Configure) -> None:
    configure()
    write_queries(TEXTS[:20])
    invoke()
    write_queries(TEXTS[:25])
    invoke()
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (5, 20)
    grown = folder_bytes(RESPONSES_DIR)
    invoke()
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (0, 25)
    assert folder_bytes(RESPONSES_DIR) == grown


def test_changed_params_reuse_nothing(configure: Configure) -> None:
    write_queries(TEXTS[:20])
    for keys in ({}, {"max_new_tokens": 31}, {"temperature": 0.5}, {"temperature": 0.5, "seed": 1}):
        configure(**keys)
        invoke()
        assert facts()["reused_rows"] == 0


def test_several_samples_of_a_query(configure: Configure) -> None:
    configure(temperature=0.7)
    write_queries(TEXTS[:20])
    assert invoke().exit_code == 0
    one = open_artifact(RESPONSES_DIR, "responses")
    rows = one.read()
    configure(temperature=0.7, samples_per_query=3)
    assert invoke().exit_code == 0
    assert (facts()["reused_rows"], facts()["computed_rows"]) == (20, 40)
    three = open_artifact(RESPONSES_DIR, "responses")
    table = check_table(three.read(), responses_schema(3), "responses")
    assert table.drop_columns(["samples"]).equals(rows)
    # The stub says the same to a prompt each time.
    assert table["samples"].to_pylist() == [[text, text] for text in table["response"].to_pylist()]
    assert three.manifest.params == {
        **one.manifest.params, "generate": one.manifest.params["generate"] | {"samples_per_query": 3},
    }  # fmt: skip
    assert (three.manifest.rows, three.manifest.counts) == (20, one.manifest.counts)


def test_a_real_engine_gives_the_same_samples_in_every_batch_and_order(configure: Configure) -> None:
    keys: dict[str, Any] = {"engine": "transformers", "max_new_tokens": 6, "temperature": 1.0, "samples_per_query": 3}
    write_queries(TEXTS[:6])
    found = []
    for batch_size in (1, 5):
        configure(**keys, options={"batch_size": batch_size})
        assert invoke().exit_code == 0
        found.append(open_artifact(RESPONSES_DIR, "responses").read())
        shutil.rmtree(".work")
    assert found[0].equals(found[1])
    answers = [[row["response"], *row["samples"]] for row in found[0].to_pylist()]
    assert all(len(set(each)) == len(each) > 1 for each in answers)


def test_samples_that_would_be_one(configure: Configure) -> None:
    configure(samples_per_query=3)
    write_queries(TEXTS[:20])
    fails("generate.samples_per_query: Value error, 3 greedy answers would be one")


def test_a_system_turn_is_in_the_prompt_the_manifest_and_the_fingerprint(configure: Configure) -> None:
    configure()
    write_queries(TEXTS[:20])
    assert invoke().exit_code == 0
    plain = open_artifact(RESPONSES_DIR, "responses")
    tokens = plain.read()["prompt_tokens"].to_pylist()
    assert "system" not in plain.manifest.params["generate"]
    configure(system="Be kind")
    assert invoke().exit_code == 0
    found = open_artifact(RESPONSES_DIR, "responses")
    assert found.manifest.params["generate"]["system"] == "Be kind"
    assert facts()["reused_rows"] == 0
    # The template's <|user|> and <|end|> are a token each, and each character is one.
    longer = [after - len("Be kind") - 2 for after in found.read()["prompt_tokens"].to_pylist()]
    assert longer == tokens


def test_a_system_turn_that_the_template_leaves_out(configure: Configure, tiny_backbone: Callable[..., Path]) -> None:
    folder = Path(shutil.copytree(tiny_backbone("llama"), "deaf"))
    (folder / "chat_template.jinja").write_text("<|user|>{{ messages[-1]['content'] }}<|end|><|bot|>")
    configure(backbone=folder, system="Be kind")
    write_queries(TEXTS[:5])
    fails("generate.system: the chat template of")


@pytest.mark.parametrize(
    ("policy", "answer", "error"),
    [
        ("keep_start", "stub answer: a 0123456789012345678901234", None),
        ("keep_end", "stub answer: 901234567890123456789 and z", None),
        ("drop", "", "dropped: longer than max_prompt_tokens"),
    ],
)
def test_what_becomes_of_a_query_that_is_too_long(
    configure: Configure, policy: str, answer: str, error: str | None
) -> None:
    configure(too_long=policy, max_prompt_tokens=30, max_new_tokens=64)
    text = "a " + "0123456789" * 5 + " and z"
    write_queries([*TEXTS[:3], text])
    assert invoke().exit_code == 0
    row = {row["id"]: row for row in open_artifact(RESPONSES_DIR, "responses").read().to_pylist()}[row_id(text)]
    assert (row["response"], row["error"]) == (answer, error)
    assert facts()["counts"]["truncated_prompts"] == (0 if error else 1)
    assert facts()["counts"]["errors"] == ({"dropped": 1} if error else {})


def test_an_instruction_that_would_be_cut_off_is_refused(configure: Configure) -> None:
    write_queries(TEXTS[:5], {"sources": [{"path": "a.txt"}, {"path": "b.txt", "instruction": "Explain:"}]})
    configure(too_long="keep_end")
    fails("generate.too_long: keep_end cuts collect.sources.1.instruction")
    configure(too_long="drop")
    assert invoke().exit_code == 0


@pytest.fixture
def uninterrupted(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Responses of a run in another work folder; they are in place when the test starts."""
    write_queries(TEXTS)
    configure()
    with monkeypatch.context() as patched:
        patched.setenv("PIPELINE_WORK_DIR", "elsewhere")
        assert invoke().exit_code == 0
    return folder_bytes(RESPONSES_DIR)


KILLS = [
    "row_store.commit:1", "row_store.committed:1", "file.rename:2", "row_store.commit:2", "row_store.committed:2",
    "artifact.commit:1",
]  # fmt: skip


@pytest.mark.models
@pytest.mark.slow
def test_vllm_adds_nothing_to_the_log(configure: Configure, small_lm: Path) -> None:
    pytest.importorskip("vllm")
    configure(small_lm, engine="vllm", options={"max_num_seqs": 4, "kv_cache_memory_bytes": 2**26})
    write_queries(TEXTS[:5])
    log = finish("generate")
    assert "engine vllm: ready" in log
    assert foreign_lines(log) == []


@pytest.mark.slow
def test_killed_at_each_point_then_run_again(
    configure: Configure, uninterrupted: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(options={"delay": 0.008})
    kept = [0]
    for point in KILLS:
        killed("generate", point, monkeypatch)
        kept.append(kept_rows("generate"))
        assert folder_bytes(RESPONSES_DIR) == uninterrupted
    assert kept == sorted(kept)  # committed rows stay
    assert kept[1] == 0 < kept[2] == kept[3] < kept[4] < kept[5] < kept[6] == len(TEXTS)

    assert invoke().exit_code == 0
    assert folder_bytes(RESPONSES_DIR) == uninterrupted
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (0, len(TEXTS))


@pytest.mark.slow
def test_two_engine_processes_fill_one_store_and_die_with_their_owner(
    configure: Configure, uninterrupted: dict[str, bytes]
) -> None:
    configure(data_parallel=2, options={"delay": 0.02})
    process = start("generate")
    wait_until(lambda: kept_rows("generate") > 0, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    kept = kept_rows("generate")
    assert 0 < kept < len(TEXTS)

    configure(data_parallel=2)
    assert invoke().exit_code == 0
    assert folder_bytes(RESPONSES_DIR) == uninterrupted
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (len(TEXTS) - kept, kept)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_every_finished_row(configure: Configure, number: signal.Signals) -> None:
    write_queries(TEXTS)
    configure(options={"delay": 0.006})
    process = start("generate")
    wait_until(lambda: bool(shards("generate")), process)
    time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in stderr
    assert not RESPONSES_DIR.exists()
    kept = kept_rows("generate")
    assert kept > 10  # also the rows that no full shard holds yet
    configure()
    assert invoke().exit_code == 0
    assert facts()["reused_rows"] == kept


def test_missing_queries(configure: Configure) -> None:
    configure()
    fails("data/queries is not a finished artifact")


def test_backbone_without_chat_template(configure: Configure, tiny_backbone: Callable[..., Path]) -> None:
    configure(backbone=tiny_backbone("llama", chat=False))
    write_queries(TEXTS[:5])
    fails("has no chat template: use an instruct model")


def test_backbone_that_is_not_there(configure: Configure) -> None:
    configure(backbone="./nowhere")
    write_queries(TEXTS[:5])
    fails("model folder ./nowhere does not exist")


def test_prompt_limit_below_the_template(configure: Configure) -> None:
    configure(max_prompt_tokens=3)
    write_queries(TEXTS[:5])
    fails("the chat template alone takes 3 tokens, the limit is 3")


def test_unknown_key(configure: Configure) -> None:
    configure(max_new_token=3)
    fails("generate.max_new_token: unknown key (did you mean 'max_new_tokens'?)")


# --- gates ----------------------------------------------------------------------------------------------------------

ALIKE = [f"the same long beginning, then {index}" for index in range(20)]


def test_a_gate_that_fails_publishes_nothing_and_keeps_the_rows(configure: Configure) -> None:
    """Twenty queries that the limit cuts to one prompt: nineteen repeat it, and so do their answers."""
    cut = {"max_prompt_tokens": 20, "max_new_tokens": 64}
    write_queries(ALIKE)
    configure(**cut)
    fails("generate.gates.equal: 0.95 of the answers repeat")
    fails("gates.equal_prompts: 0.95 of the prompts repeat another row's")
    assert facts()["counts"]["equal_prompts"] == 19  # the record shows what failed
    configure(**cut, gates={"equal": 1.0, "equal_prompts": 1.0})
    assert invoke().exit_code == 0
    assert (facts()["computed_rows"], facts()["reused_rows"]) == (0, 20)
    assert "gates" not in open_artifact(RESPONSES_DIR, "responses").manifest.params["generate"]


def test_a_share_at_its_limit_passes(configure: Configure) -> None:
    write_queries(ALIKE)
    configure(max_prompt_tokens=20, max_new_tokens=64, gates={"equal": 0.95, "equal_prompts": 0.95})
    assert invoke().exit_code == 0


def test_the_first_thousand_rows_warn_before_the_end(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    write_queries([f"the same long beginning, then {index}" for index in range(1005)])
    configure(max_prompt_tokens=20, max_new_tokens=19)
    fails("gates.equal")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in warnings if "0.999 of the prompts repeat" in line and "gates.equal_prompts" in line]
    assert [line for line in warnings if "100 % of the first answers end at max_new_tokens" in line]


def test_a_template_that_drops_the_text_is_refused_before_the_engine_starts(
    configure: Configure, tiny_backbone: Callable[..., Path]
) -> None:
    folder = Path(shutil.copytree(tiny_backbone("llama"), "mute"))
    (folder / "chat_template.jinja").write_text("<|user|>hello<|end|><|bot|>")
    configure(backbone=folder)
    write_queries(TEXTS[:5])
    fails("leaves the user's text out")
