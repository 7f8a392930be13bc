"""The command line: each command through its real entry, errors in one line without a traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner, Result

from pipeline.__main__ import app
from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_tokenizer
from pipeline.core.artifacts import create
from tests.conftest import ROOT
from tests.toy_workspace import USABLE, flip_byte, make_workspace


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def fails(message: str, *arguments: object) -> None:
    result = call(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "polars", "mteb", "matplotlib")
    code = f"import sys; from pipeline.__main__ import app; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert "audit" in call("--help").stdout


def test_audit_of_a_sound_workspace_prints_what_it_verified(workspace: Path) -> None:
    make_workspace(workspace)
    result = call("audit")
    assert result.exit_code == 0
    assert "data/responses" in result.stdout
    assert "no findings in 6 artifacts, no dvc.lock" in result.stdout


def test_audit_names_a_flipped_byte_and_fails(workspace: Path) -> None:
    make_workspace(workspace)
    flip_byte(Path("data/targets/part-00000.parquet"), 60)
    result = call("audit")
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert line.startswith("data/targets part-00000.parquet: sha256 is")
    as_json = call("audit", "--json")
    assert as_json.exit_code == 1
    assert [finding["where"] for finding in json.loads(as_json.stdout)["findings"]] == ["part-00000.parquet"]


def test_audit_of_nothing(workspace: Path) -> None:
    result = call("audit")
    assert result.exit_code == 1
    assert "data/queries: not made yet" in result.stderr
    assert "no stage has written an artifact" in result.stderr


def test_inspect(workspace: Path) -> None:
    make_workspace(workspace)
    assert USABLE[0] in call("inspect", "embed", "--n", 1).stdout
    assert "answer to" in call("inspect", "generate", "--id", USABLE[0]).stdout
    fails("no query has id 'zz'", "inspect", "generate", "--id", "zz")
    fails("unknown stage 'x'", "inspect", "x")
    fails("unknown stage 'x'", "inspect", "x", "--id", USABLE[0])


def test_inspect_before_anything_was_made(workspace: Path) -> None:
    fails("data/queries is not a finished artifact", "inspect", "collect")


def test_params_prints_the_plan(workspace: Path) -> None:
    result = call("params", "--params", ROOT / "params.yaml")
    assert result.exit_code == 0
    assert "Qwen/Qwen3-4B" in result.stdout
    assert "note: probes.safety.revision" in result.stdout
    assert "--gpu NAME adds times" in result.stdout
    on_one = call("params", "--params", ROOT / "params.yaml", "--gpu", "4090").stdout
    assert "on one 4090, computed and not measured" in on_one
    assert "of it student" in on_one
    fails("--gpu: no data sheet of K80", "params", "--params", ROOT / "params.yaml", "--gpu", "K80")
    fails("params.yaml does not exist", "params")


def test_a_table_in_a_pipe_keeps_its_cells(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    result = CliRunner().invoke(app, ["params", "--params", str(ROOT / "params.yaml")])
    assert result.exit_code == 0, result.output
    assert "…" not in result.output and max(map(len, result.output.splitlines()[:5])) == 200


def test_backbone_lists_and_switches(workspace: Path) -> None:
    assert "meta-llama/Llama-3.2-1B-Instruct" in call("backbone").stdout
    Path("params.yaml").write_text((ROOT / "params.yaml").read_text())
    result = call("backbone", "qwen3-8b", "--memory", 24)
    assert "backbone.name: Qwen/Qwen3-4B -> Qwen/Qwen3-8B" in result.stdout
    assert "teach.mntp.micro_batch_size: 8 -> 1" in result.stdout
    assert "has these params already" in call("backbone", "qwen3-8b", "--memory", 24).stdout
    fails("unknown backbone 'gpt'", "backbone", "gpt")


@pytest.fixture
def model(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    from pipeline.encoder.folder.config import EncoderConfig
    from pipeline.encoder.folder.write import write_encoder
    from pipeline.encoder.student import new_student

    folder = tiny_backbone("llama")
    params = BackboneParams(name=str(folder), dtype="float32")
    config = EncoderConfig(
        backbone=identify(str(folder), None), chat_template_kwargs={}, template="raw", max_query_tokens=32,
        compression_tokens=2, thought_tokens=0, hidden=32, width=5, teacher={"name": "t"},
    )  # fmt: skip
    student = new_student(load_backbone(params), 5, compression_tokens=2, thought_tokens=0, seed=0)
    with create(Path("models/encoder"), kind="encoder", params={}) as out:
        write_encoder(out, student, load_tokenizer(params), config, rows=1, steps=1)
    return Path("models/encoder")


def test_encode_every_format_to_the_same_embeddings(model: Path) -> None:
    texts = ["one", "a second text"]
    frame = pl.DataFrame({"text": texts, "other": ["x", "y"]})
    Path("in.txt").write_text("one\na second text\n")
    frame.write_ndjson("in.jsonl")
    frame.write_csv("in.csv")
    frame.write_parquet("in.parquet")
    found = []
    for source in ("in.txt", "in.jsonl", "in.csv", "in.parquet"):
        result = call("encode", "--model", model, "--input", source, "--output", "out.npy")
        assert result.exit_code == 0, result.output
        assert "2 embeddings of 5 dimensions -> out.npy" in result.stdout
        found.append(np.load("out.npy"))
    assert found[0].dtype == np.float32
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    assert (
        call("encode", "--model", model, "--input", "in.csv", "--output", "o.parquet", "--prompt", "Say:").exit_code
        == 0
    )
    table = pl.read_parquet("o.parquet")
    assert table["text"].to_list() == texts
    assert np.abs(table["embedding"].to_numpy() - found[0]).max() > 1e-4


def test_encode_into_the_teachers_space(model: Path) -> None:
    Path("in.txt").write_text("one\ntwo\n")
    for space in ("trained", "teacher"):
        result = call("encode", "--model", model, "--input", "in.txt", "--output", f"{space}.npy", "--space", space)
        assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(np.load("trained.npy"), np.load("teacher.npy"))  # this encoder has no transform
    fails("--space: unknown value 'own'", *encode("--input", "in.txt", "--output", "o.npy", "--space", "own"))


def test_another_backbone_and_texts_that_are_cut(
    model: Path, tiny_backbone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    Path("in.txt").write_text("short\n" + "x" * 40 + "\n")
    Path("copy").symlink_to(tiny_backbone("llama"))
    commands: list[tuple[object, ...]] = [
        ("encode", "--input", "in.txt", "--output", "out.npy"),
        ("search", "--corpus", "in.txt", "--max-new-tokens", 1, "short"),
        ("decode", "--max-new-tokens", 1, "short"),
    ]
    for command in commands:
        options = (*command, "--model", model, "--backbone")
        fails("--allow-other-backbone", *options, tiny_backbone("qwen3"))
        assert call(*options, "copy").exit_code == 0
        caplog.clear()
        assert call(*options, tiny_backbone("qwen3"), "--allow-other-backbone").exit_code == 0
        assert "the encoder was trained on" in caplog.text
    first = np.load("out.npy")
    result = call(*commands[0], "--model", model)
    assert "note: 1 of 2 texts are longer than 32 tokens" in result.stdout
    assert np.abs(np.load("out.npy") - first).max() > 1e-3


def test_decode_prints_one_answer_a_text(model: Path) -> None:
    result = call("decode", "--model", model, "one", "two", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") >= 2


def encode(*arguments: object) -> list[object]:
    return ["encode", "--model", "none", *arguments]


def test_mistakes_with_files_come_before_the_model_is_loaded(workspace: Path) -> None:
    Path("in.txt").write_text("x\n")
    Path("empty.txt").write_text("")
    Path("in.csv").write_text("a,b\n1,x\n")
    Path("bad.parquet").write_bytes(b"PAR1")
    Path("null.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    fails("none is not an encoder", *encode("--input", "in.txt", "--output", "o.npy"))
    fails("unknown format '.csv' (known: .npy, .parquet)", *encode("--input", "in.txt", "--output", "o.csv"))
    fails("--input: gone.txt does not exist", *encode("--input", "gone.txt", "--output", "o.npy"))
    fails("empty.txt holds no text", *encode("--input", "empty.txt", "--output", "o.npy"))
    fails("no column 'text' (columns there: a, b)", *encode("--input", "in.csv", "--output", "o.npy"))
    fails("--format: stdin.pdf: unknown format", *encode("--input", "-", "--output", "o.npy", "--format", "pdf"))
    fails(
        "--keep: in.csv: no column 'z'",
        *encode("--input", "in.csv", "--output", "o.parquet", "--column", "a", "--keep", "z"),
    )
    fails("--output: o.npy holds no columns", *encode("--input", "in.csv", "--output", "o.npy", "--keep", "all"))
    fails("--quantize: unknown value 'int4'", *encode("--input", "in.txt", "--output", "o.npy", "--quantize", "int4"))


def test_encode_reads_standard_input_and_keeps_columns(model: Path) -> None:
    Path("in.jsonl").write_text('{"id": 7, "text": " one "}\n{"id": 8, "text": "two"}\n')
    common = ["encode", "--model", str(model), "--output", "o.parquet", "--keep", "id"]
    assert call(*common, "--input", "in.jsonl").exit_code == 0
    first = pl.read_parquet("o.parquet")
    assert first.select("id", "text").rows() == [(7, " one "), (8, "two")]
    piped = CliRunner().invoke(app, [*common, "--input", "-", "--format", "jsonl"], input=Path("in.jsonl").read_bytes())
    assert piped.exit_code == 0, piped.output
    assert pl.read_parquet("o.parquet").equals(first)
    assert call(*common, "--input", "in.jsonl", "--tidy").exit_code == 0
    tidy = pl.read_parquet("o.parquet")
    assert tidy["text"].to_list() == ["one", "two"]
    assert np.abs((tidy["embedding"].to_numpy() - first["embedding"].to_numpy())[0]).max() > 1e-4
    small = call("encode", "--model", model, "--input", "in.jsonl", "--output", "o.npy", "--truncate-dim", 3)
    assert "2 embeddings of 3 dimensions" in small.stdout
    np.testing.assert_allclose(np.linalg.norm(np.load("o.npy"), axis=1), 1, rtol=1e-6)
    wide = call("encode", "--model", model, "--input", "in.jsonl", "--output", "o.npy", "--truncate-dim", 6)
    assert wide.exit_code == 1
    assert wide.stderr.splitlines()[-1] == "error: --truncate-dim: 6 of 5 dimensions: must be between 1 and 5"


def test_the_command_embeds_what_the_api_embeds(model: Path) -> None:
    """A space at the end of a text belongs to it."""
    from pipeline import load

    texts = ["one ", "e\u0301t\u00e9", "two  spaces"]
    Path("in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert call("encode", "--model", model, "--input", "in.jsonl", "--output", "o.npy").exit_code == 0
    np.testing.assert_allclose(np.load("o.npy"), load(model, device="cpu").encode(texts), atol=1e-6)
