"""Missing data is listed at once. Processes of their own: a cache is chosen when the libraries are imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.core.errors import EvaluationError
from pipeline.tasks.availability import check_data
from tests.conftest import ROOT

CHECK = """
import json, sys
from pipeline.core.errors import EvaluationError
from pipeline.tasks.availability import check_data
from pipeline.tasks.suites import find_tasks
try:
    check_data(find_tasks([], json.loads(sys.argv[1])))
except EvaluationError as error:
    print(error)
"""
REVISION = "a0d554a64d88156834ff5ae9920b964011b16384"  # of STS12 in mteb


def check(tasks: list[str], home: Path, **environment: str) -> str:
    """What the check has to say about tasks, with `home` as the cache."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(tasks)],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fill_cache(home: Path, revision: str) -> None:
    """STS12 with one pair, as `datasets` keeps it after loading it from the hub."""
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo, Version
    from datasets.arrow_writer import ArrowWriter

    folder = home / "datasets" / "mteb___sts12-sts" / "default" / "0.0.0" / revision
    folder.mkdir(parents=True)
    data = Dataset.from_list([{"sentence1": "a", "sentence2": "b", "score": 1.0}])
    with ArrowWriter(path=str(folder / "sts12-sts-test.arrow"), features=data.features) as writer:
        writer.write_table(data.data.table.combine_chunks())
        rows, size = writer.finalize()
    split = SplitInfo(name="test", num_bytes=size, num_examples=rows, dataset_name="sts12-sts")
    DatasetInfo(
        features=data.features, builder_name="parquet", dataset_name="sts12-sts", config_name="default",
        version=Version("0.0.0"), splits=SplitDict({"test": split}, dataset_name="sts12-sts"), dataset_size=size,
    ).write_to_directory(str(folder))  # fmt: skip


def test_all_missing_data_sets_are_listed_with_their_revisions_and_how_to_fetch_them(tmp_path: Path) -> None:
    import mteb

    names = ["STS12", "ArguAna", "STS17", "Banking77Classification"]
    message = check(names, tmp_path)
    lines = message.splitlines()
    assert lines[0] == "the data of 4 of 4 tasks cannot be loaded:"
    for name, line in zip(names, lines[1:5], strict=True):
        source = mteb.get_task(name).metadata.dataset
        assert line.startswith(f"  {name}: {source['path']} at {source['revision']}: ")
    assert "HF_HUB_OFFLINE is set" in lines[5] and str(tmp_path / "datasets") in lines[5]
    assert f"mteb.get_tasks({names})" in lines[6]


def test_the_parts_of_an_aggregate_are_listed(tmp_path: Path) -> None:
    message = check(["CQADupstackRetrieval"], tmp_path)
    assert message.startswith("the data of 12 of 12 tasks") and "CQADupstackUnixRetrieval: mteb/" in message


@pytest.mark.slow
def test_without_a_network_the_reason_is_the_librarys(tmp_path: Path) -> None:
    """Not told to be offline: each data set is asked for, at an address that nobody answers."""
    message = check(["STS12"], tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith("the data of 1 of 1 tasks cannot be loaded:\n  STS12: mteb/sts12-sts at ")
    assert "HF_HUB_OFFLINE" not in message


def test_a_cache_that_has_the_data_is_enough(tmp_path: Path) -> None:
    fill_cache(tmp_path, REVISION)
    assert check(["STS12"], tmp_path) == ""


def test_a_revision_may_be_given_by_its_first_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def task(revision: str) -> Any:
        metadata = SimpleNamespace(name="Some", dataset={"path": "mteb/sts12-sts", "revision": revision}, tasks=None)
        return SimpleNamespace(metadata=metadata, load_data=lambda: None)

    fill_cache(tmp_path, REVISION)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    check_data([task(REVISION[:7])])
    with pytest.raises(EvaluationError, match=f"mteb/sts12-sts at bbbbbbb: the cache has revision {REVISION}"):
        check_data([task("b" * 7)])


def test_another_revision_in_the_cache_is_not_taken_for_the_tasks(tmp_path: Path) -> None:
    fill_cache(tmp_path, "b" * 40)
    message = check(["STS12"], tmp_path)
    assert f"mteb/sts12-sts at {REVISION}: the cache has revision {'b' * 40} of it instead" in message
