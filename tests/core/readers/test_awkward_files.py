"""Every awkward file through every way in: `collect`, `encode`, `search`, `decode` and local tasks read alike."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.cli import use
from pipeline.cli.search import search
from pipeline.collect.__main__ import app as collect
from pipeline.core.errors import EvaluationError, SourceError
from pipeline.core.readers import open_texts
from pipeline.core.text import normalize_text
from pipeline.encoder.inference import Embedded
from pipeline.lens.sources import from_file
from pipeline.tasks.local_dataset import LocalData
from tests.core.readers.awkward import CASES, Awkward
from tests.encoder.test_encode_file import LengthEncoder

GOOD = [case for case in CASES if not case.refusal]
BAD = [case for case in CASES if case.refusal]
WHOLE = [case for case in GOOD if None not in case.texts]
NULLS = [case for case in GOOD if None in case.texts]


def each(cases: Sequence[Awkward]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


class AnyText(LengthEncoder):
    """Embeds a text by its number of characters, the empty one too."""

    def embed(self, texts: Sequence[str], **options: Any) -> Embedded:
        return Embedded(np.array([[len(text), 1.0, 0.0] for text in texts], dtype=np.float32), 0)


def params(sources: list[dict[str, Any]]) -> None:
    section = {"local_dir": "in", "sources": sources, "heldout_fraction": 0.5, "min_chars": 1, "max_tokens": None}
    with Path("params.yaml").open("w") as file:
        YAML().dump({"backbone": {"name": "unused"}, "collect": section}, file)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[int, set[str]]]]:
    """By case, how many rows the stage `collect` read, and the queries that it made of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("collect"))
        found = {}
        for number, case in enumerate(GOOD):
            label = case.write(Path("in") / str(number)).relative_to("in").as_posix()
            params([{"kind": "local", "path": label}, {"kind": "local", "path": "filler.txt"}])
            Path("in/filler.txt").write_text("".join(f"filler {row}\n" for row in range(20)))
            result = CliRunner().invoke(collect, [])
            assert result.exit_code == 0, (case.name, result.output)
            counts = json.loads(Path("results/collect.json").read_text())["counts"]
            tables = [pl.read_parquet(f"data/queries/{split}.parquet") for split in ("train", "heldout")]
            texts = pl.concat(tables).filter(pl.col("source") == label)["text"]
            found[case.name] = (counts[label]["read"], set(texts))
        yield found


@each(GOOD)
def test_collect(collected: dict[str, tuple[int, set[str]]], case: Awkward) -> None:
    read, texts = collected[case.name]
    assert read == len(case.texts)
    assert texts == {normalize_text(text) for text in case.texts if text} - {""}


@pytest.fixture
def written(workspace: Path, case: Awkward) -> Path:
    return case.write(workspace / "in")


@each(WHOLE)
def test_encode(monkeypatch: pytest.MonkeyPatch, written: Path, case: Awkward) -> None:
    monkeypatch.setattr(use, "load_encoder", lambda *_: AnyText())
    arguments = ["encode", "--model", "none", "--input", str(written), "--output", "out.parquet"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = pl.read_parquet("out.parquet")
    assert table["text"].to_list() == list(case.texts)
    assert table["embedding"].to_numpy()[:, 0].tolist() == [len(text or "") for text in case.texts]
    tidy = CliRunner().invoke(app, [*arguments, "--tidy"])
    assert tidy.exit_code == 0, tidy.output
    assert pl.read_parquet("out.parquet")["text"].to_list() == [normalize_text(text or "") for text in case.texts]


@each(WHOLE)
def test_search(written: Path, case: Awkward) -> None:
    hits = search(AnyText(), open_texts(written), "q", count=len(case.texts))  # type: ignore[arg-type]
    assert [hit.text for hit in sorted(hits, key=lambda hit: hit.row)] == list(case.texts)


@each(WHOLE)
def test_decode(written: Path, case: Awkward) -> None:
    source = from_file(open_texts(written))
    assert source.rows == len(case.texts)
    assert [text for chunk in source.chunks(2) for text in chunk.entries.queries] == list(case.texts)


def task_folder(written: Path, case: Awkward) -> LocalData:
    """The files as the only config of a local task."""
    names = [name for name in case.files if name != case.path] if written.is_dir() else [case.path or written.name]
    paths = sorted(name for name in names if not re.search(r"README|/[._]", name))
    entries = "".join(f"  - {{split: test, path: '{path}'}}\n" for path in paths)
    (written.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{entries}---\n")
    return LocalData(written.parent)


@each(WHOLE)
def test_a_local_task(written: Path, case: Awkward) -> None:
    table = task_folder(written, case).read("default", "test", texts=["text"])
    assert table["text"].to_pylist() == list(case.texts)


@each(NULLS)
def test_nulls_are_counted(written: Path, case: Awkward) -> None:
    count = list(case.texts).count(None)
    with pytest.raises(SourceError, match=f"column 'text' is null in {count} rows, first in (line|row) "):
        open_texts(written)
    with pytest.raises(EvaluationError, match=f"column 'text' has {count} empty rows"):
        task_folder(written, case).read("default", "test", texts=["text"])


@each(BAD)
def test_refused_alike(written: Path, case: Awkward) -> None:
    params([{"kind": "local", "path": written.name}])
    stage = CliRunner().invoke(collect, [])
    encode = CliRunner().invoke(app, ["encode", "--model", "none", "--input", str(written), "--output", "out.npy"])
    for result in (stage, encode):
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert re.search(case.refusal, result.stderr.splitlines()[-1]), result.stderr
    if not written.is_dir() and written.exists():
        with pytest.raises(EvaluationError, match=case.refusal):
            task_folder(written, case).read("default", "test", texts=["text"])
