"""A few rows through the stages on a tiny backbone: what is found of each row, and what ends a stage."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.collect.params import CollectParams
from pipeline.core.artifacts import create
from pipeline.core.schemas import QUERIES
from pipeline.core.vectors import matrix
from pipeline.embed.params import EmbedParams
from pipeline.generate.params import GenerateParams
from pipeline.preview.show import SHOWN, loss_lines, one_line, row_lines
from pipeline.preview.stages import STEPS, Preview, Sections, run_stages
from pipeline.train.params import TrainParams
from tests.generate.engines.fake_endpoint import FakeEndpoint
from tests.toy_workspace import table
from tests.train.conftest import TRAIN

LONG = "a long question " * 4
TEXTS = ["hi", "what is this?", "two\nlines", LONG]
# A byte is a token of the tiny tokenizer, the template has three.
GENERATE = {"engine": "echo", "dtype": "float32", "max_new_tokens": 30, "max_prompt_tokens": 40}
EMBED = {"teacher": {"kind": "backbone", "max_tokens": 40}, "dtype": "float32"}


@pytest.fixture(scope="module")
def sections(tiny_backbone: Callable[..., Path]) -> Sections:
    return Sections(
        BackboneParams(name=str(tiny_backbone("llama")), dtype="float32"),
        CollectParams.model_validate({"local_dir": ".", "sources": [{"kind": "local", "path": "none.txt"}]}),
        GenerateParams.model_validate(GENERATE),
        EmbedParams.model_validate(EMBED),
        TrainParams.model_validate({**TRAIN, "max_response_tokens": 64}),
    )


def few(texts: list[str] = TEXTS) -> pa.Table:
    return table([{"id": f"{at:02}", "text": text, "source": "s"} for at, text in enumerate(texts)], QUERIES)


def changed(sections: Sections, section: str, **keys: Any) -> Sections:
    """Sections with other keys of one of them."""
    params = getattr(sections, section)
    return replace(sections, **{section: type(params).model_validate({**params.model_dump(), **keys})})


@pytest.fixture(scope="module")
def found(sections: Sections, tmp_path_factory: pytest.TempPathFactory) -> Preview:
    folder = tmp_path_factory.mktemp("preview")
    with contextlib.chdir(folder):
        preview = run_stages(sections, few(), folder / "scratch")
    assert [path.name for path in folder.iterdir()] == ["scratch"]
    return preview


def test_every_row_goes_through_the_stages(found: Preview) -> None:
    assert found.problems == []
    assert found.prompts[0] == "<|user|>hi<|end|><|bot|>"
    assert found.trained_prompts[0] == "<|user|>hi<|end|><|bot|> + 3 new tokens"
    assert found.answers["finish_reason"].to_pylist() == ["stop", "stop", "stop", "length"]
    assert found.targets["id"].to_pylist() == ["00", "01", "02", "03"]
    assert len(found.losses) == STEPS and all(math.isfinite(step["loss"]) for step in found.losses)
    assert {name: speed.rows for name, speed in found.speeds.items()} == {"generate": 4, "embed": 4, "train": 12}
    assert found.speeds["train"].flops > 0
    assert list(found.memory) == ["generate", "embed", "train"]


def test_what_is_cut_of_a_row_is_named_with_its_limit(found: Preview) -> None:
    assert not found.cuts["00"]
    cuts = "\n".join(found.cuts["03"])
    for limit in ("generate.max_prompt_tokens 40", "generate.max_new_tokens 30", "train.max_query_tokens 64"):
        assert limit in cuts
    assert "embed.teacher.max_tokens 40" in cuts


def test_the_lines_show_prompt_answer_target_and_neighbours(found: Preview) -> None:
    lines = list(row_lines(found))
    first = lines[: lines.index(next(line for line in lines if line.startswith("2 of 4")))]
    assert first[0] == "1 of 4, id 00, from s"
    assert "5 tokens: <|user|>hi<|end|><|bot|>" in first[1]
    assert "the model ended it: stub answer:" in first[2]
    vectors = matrix(found.targets["embedding"])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    nearest = 1 + int(np.argsort(-(unit @ unit[0]))[1])
    assert f"length {np.linalg.norm(vectors[0]):.4g}, nearest {nearest} (" in first[3]
    assert any("two\\nlines" in line for line in lines)
    assert "before any update" in next(loss_lines(found))


def test_the_middle_of_a_long_text_is_left_out() -> None:
    shown = one_line("a" * SHOWN + "\n" + "b" * SHOWN)
    assert len(shown) < SHOWN + 20
    assert shown.startswith("aaa") and shown.endswith("bbb") and "[...]" in shown


def test_gates_of_answers_and_targets_are_problems(sections: Sections, workspace: Path) -> None:
    strict = changed(changed(sections, "generate", gates={"cut": 0.2}), "embed", gates={"cosine": 0.0})
    found = run_stages(strict, few(), workspace / "scratch")
    gates = [problem.split(":")[0] for problem in found.problems]
    assert gates == ["generate.gates.cut", "embed.gates.cosine"]
    assert "0.25" in found.problems[0] and "0.2" in found.problems[0]
    assert found.losses  # the stages behind it run all the same


def test_the_queries_own_targets_come_to_train(sections: Sections, workspace: Path) -> None:
    mapped = changed(changed(sections, "embed", queries=True), "train", response_share=0.3, response_form="added")
    found = run_stages(mapped, few(), workspace / "scratch")
    assert (found.problems, len(found.losses)) == ([], STEPS)
    assert found.targets.column_names == ["id", "embedding", "query_embedding"]
    assert found.speeds["embed"].rows == 4  # of queries, whose rows a whole run is counted in
    refused = run_stages(changed(mapped, "embed", queries=False), few(), workspace / "again")
    assert [problem.partition(": added")[0] for problem in refused.problems] == ["train fails: train.response_form"]


def test_speeds_count_queries_and_rows_of_whole_steps(sections: Sections, workspace: Path) -> None:
    several = changed(sections, "generate", samples_per_query=3, temperature=1.0)
    found = run_stages(changed(several, "train", batch_size=3), few(), workspace / "scratch")
    assert found.problems == []
    # The second of the three steps ends the epoch of four rows.
    assert {name: speed.rows for name, speed in found.speeds.items()} == {"generate": 4, "embed": 4, "train": 3 + 1 + 3}


def test_a_teacher_that_the_stage_was_not_asked_for_is_not_trained_yet(sections: Sections, workspace: Path) -> None:
    with create(Path("models/teacher"), kind="teacher", params={"asked": False}):
        pass
    found = run_stages(changed(sections, "embed", teacher={"kind": "llm2vec-trained"}), few(), workspace / "scratch")
    assert found.problems == [] and any("not trained yet" in note for note in found.notes)


def test_what_an_automatic_transform_chose_is_noted(sections: Sections, workspace: Path) -> None:
    hashed = {"kind": "hash", "options": {"width": 64}}  # normal vectors: no two point the same way
    automatic = changed(sections, "embed", teacher=hashed, transform={"kind": "auto"})
    found = run_stages(automatic, few(), workspace / "scratch")
    assert any(note.startswith("embed.transform auto (none)") for note in found.notes)


def test_a_stage_that_fails_ends_the_preview(sections: Sections, workspace: Path) -> None:
    short = changed(sections, "generate", max_new_tokens=2)
    found = run_stages(changed(short, "train", max_response_tokens=8), few(), workspace / "scratch")
    assert "100% of the answers end at generate.max_new_tokens 2" in found.notes
    [problem] = found.problems
    assert problem.startswith("train fails: train.max_response_tokens: ")
    assert found.targets.num_rows == 4 and not found.losses
    assert any(line.startswith("  target") for line in row_lines(found))


def test_an_endpoint_answers(sections: Sections, workspace: Path) -> None:
    with FakeEndpoint().serving() as server:
        options = {"base_url": server.url, "model": "org/model"}
        found = run_stages(changed(sections, "generate", engine="openai", options=options), few(), workspace / "s")
    assert found.problems == []
    assert found.answers["response"].to_pylist()[0] == "answer: hi"
    assert any("its own chat template" in note for note in found.notes)


def test_an_endpoint_that_is_not_there_is_the_problem(sections: Sections, workspace: Path) -> None:
    gone = {"base_url": "http://127.0.0.1:9/v1", "attempts": 1}
    found = run_stages(changed(sections, "generate", engine="openai", options=gone), few(), workspace / "s")
    [problem] = found.problems
    assert problem.startswith("generate fails: generate.options.base_url: ")
    assert list(row_lines(found))[1] == "  prompt   <|user|>hi<|end|><|bot|>"


def test_what_is_done_otherwise_than_in_a_run_is_noted(sections: Sections, workspace: Path) -> None:
    teacher = {"kind": "llm2vec-trained", "max_tokens": 40}
    other = changed(sections, "embed", teacher=teacher, transform={"kind": "center"})
    found = run_stages(changed(other, "generate", too_long="drop"), few(), workspace / "scratch")
    assert found.problems == []  # a dropped row is no failure
    assert any(line.startswith("  answer   none: dropped") for line in row_lines(found))
    assert found.targets.num_rows == 3
    np.testing.assert_allclose(matrix(found.targets["embedding"]).mean(0), 0, atol=1e-5)
    notes = "\n".join(found.notes)
    for part in ("not trained yet", "embed.transform center", "random start"):
        assert part in notes
