"""The names and revisions under which results are published."""

from pathlib import Path

from pipeline.evaluate.run import run_systems
from pipeline.evaluate.summary import write_mteb_format
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import find_tasks
from tests.evaluate.fakes import BACKBONE, CONFIG, STUDENT, Named

INSTRUCTIONS = load_instructions()


def test_systems_are_published_under_real_names_and_never_over_one_another(tmp_path: Path, folders: list[Path]) -> None:
    import mteb

    minilm = {"name": "/somewhere/all-MiniLM-L6-v2", "sha256": "a" * 64, "kind": "sentence-transformers"}
    systems = [
        Named("student", STUDENT, "generative instruction"),
        Named("teacher", minilm, "bare text"),
        Named("mini", minilm, "query prompt 'q: '"),
        Named("untrained", {"name": "untrained", "seed": 0, "backbone": BACKBONE, "config": CONFIG}),
        Named("untrained-1", {"name": "untrained", "seed": 1, "backbone": BACKBONE, "config": CONFIG}),
        Named("mapped", minilm | {"transform": {"kind": "center", "sha256": "d" * 64}}),
        Named("llm2vec", {"name": "Qwen/Q", "revision": "e" * 40, "kind": "llm2vec", "adapters": [{"name": "a/b"}]}),
        Named("mean", {"name": "Qwen/Q", "revision": "e" * 40, "kind": "backbone"}),
        Named("bge", {"name": "BAAI/bge-small-en-v1.5", "revision": "5c38ec7c405ec4b44b94cc5a9bb96e735b38267a"}),
    ]
    tasks = find_tasks(folders[:1])
    runs = run_systems(systems, tasks, INSTRUCTIONS, work=tmp_path / "work", dtype="float32", model_name="me/mine")
    write_mteb_format(tmp_path / "out", runs)
    found = mteb.ResultCache(tmp_path / "out").load_results().model_results
    assert {model.model_name: model.model_revision[:6] for model in found} == {
        "me/mine": "c0ffee",
        "local/all-MiniLM-L6-v2": "aaaaaa",
        "local/all-MiniLM-L6-v2-mini": "aaaaaa",
        "llm2vec-gen/tiny-lm-untrained": runs[3].meta.revision[:6],
        "llm2vec-gen/tiny-lm-untrained-1": runs[4].meta.revision[:6],
        "llm2vec-gen/all-MiniLM-L6-v2-mapped": runs[5].meta.revision[:6],
        "llm2vec-gen/Q-llm2vec": runs[6].meta.revision[:6],
        "llm2vec-gen/Q-mean": runs[7].meta.revision[:6],
        "BAAI/bge-small-en-v1.5": "5c38ec",
    }
    assert [run.meta.adapted_from for run in runs[5:]] == [minilm["name"], "Qwen/Q", "Qwen/Q", None]
    assert not {run.meta.revision[:6] for run in runs[5:8]} & {"aaaaaa", "eeeeee"}
    student = runs[0].meta
    assert (student.embed_dim, student.max_tokens, student.use_instructions) == (8, 64, True)
    assert student.n_parameters is None and student.open_weights is None
    assert runs[1].meta.framework == ["Sentence Transformers", "PyTorch"] and not runs[1].meta.use_instructions
    assert all(len(run.meta.revision) == 40 for run in runs)
