"""The Python API: what it takes and gives, and what it says to a mistake."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import pipeline
from pipeline import Embedder, load, similarity
from pipeline.core.errors import BackboneError, PipelineError, SourceError, TrainingError
from pipeline.core.target_transform import TargetTransform
from pipeline.lens import decode
from pipeline.tasks.instructions import load_instructions
from tests.conftest import ROOT
from tests.encoder.test_inference import write

TEXTS = ["one", "a second text", "", "東京"]
WIDTH = 5
LIMIT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("api") / "encoder"
    write(folder, tiny_backbone("llama"), None)
    return folder


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Embedder:
    return load(str(folder), device="cpu")


# --- the package ----------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_and_naming_a_thing_loads_it() -> None:
    code = (
        "import sys, pipeline; assert 'pipeline.api' not in sys.modules\n"
        "from pipeline import load, similarity, Embedder\n"
        "print([name for name in ('torch', 'transformers', 'mteb', 'polars') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_type_checkers_of_others_read_the_hints() -> None:
    import tomllib

    assert (ROOT / "pipeline" / "py.typed").is_file()
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in described["tool"]["setuptools"]["package-data"]["*"]


def test_the_surface() -> None:
    assert pipeline.__all__ == ["Embedder", "load", "similarity"]
    assert all(getattr(pipeline, name).__doc__ for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'lode'"):
        pipeline.lode  # noqa: B018


# --- encode ---------------------------------------------------------------------------------------------------------


def test_encode_gives_what_the_encoder_gives(embedder: Embedder) -> None:
    expected = embedder.encoder.encode(TEXTS, instruction="Say:")
    found = embedder.encode(TEXTS, prompt="Say:")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(embedder.encode(TEXTS, prompt="Say:", batch_tokens=1), expected, atol=1e-6)
    assert (embedder.width, embedder.max_tokens) == (WIDTH, LIMIT)


@pytest.mark.parametrize("make", [tuple, np.array, pl.Series, lambda texts: np.array(texts, dtype=object)])
def test_several_texts_of_any_kind(embedder: Embedder, make: Callable[[list[str]], Any]) -> None:
    np.testing.assert_array_equal(embedder.encode(make(TEXTS)), embedder.encode(TEXTS))


def test_one_text_and_none(embedder: Embedder) -> None:
    assert embedder.encode("one").shape == (WIDTH,)
    np.testing.assert_allclose(embedder.encode("one"), embedder.encode(["one"])[0], atol=1e-6)
    assert embedder.encode([]).shape == (0, WIDTH)
    assert embedder.encode([], normalize=True).shape == (0, WIDTH)
    assert np.isfinite(embedder.encode("")).all()


def test_normalize(embedder: Embedder) -> None:
    found, plain = embedder.encode(TEXTS, normalize=True), embedder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found * np.linalg.norm(plain, axis=1, keepdims=True), plain, atol=1e-5)
    assert np.linalg.norm(embedder.encode("one", normalize=True)) == pytest.approx(1)


def test_the_first_dimensions(embedder: Embedder) -> None:
    plain = embedder.encode(TEXTS)
    np.testing.assert_array_equal(embedder.encode(TEXTS, truncate_dim=2), plain[:, :2])
    unit = embedder.encode_query("one", truncate_dim=2, normalize=True)
    assert unit.shape == (2,)
    assert np.linalg.norm(unit) == pytest.approx(1)
    stream = embedder.encode_stream(TEXTS, chunk=3, truncate_dim=2, normalize=True)
    expected = embedder.encode(TEXTS, truncate_dim=2, normalize=True)
    np.testing.assert_allclose(np.concatenate(list(stream)), expected, atol=1e-6)
    for wrong in (0, WIDTH + 1):
        for call in (embedder.encode, embedder.encode_stream):
            with pytest.raises(SourceError, match=f"truncate_dim: {wrong} of {WIDTH} dimensions"):
                call(TEXTS, truncate_dim=wrong)


def behind_a_shift(folder: Path, tmp_path: Path) -> Path:
    """The same encoder, trained behind a transform that took 1 from every number."""
    shifted = TargetTransform("center", False, *[np.ones(WIDTH, np.float32)] * 3)
    copied = Path(shutil.copytree(folder, tmp_path / "encoder"))
    shifted.save(copied)
    config = copied / "encoder_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "transform": shifted.identity}))
    return copied


def test_the_teachers_space_is_the_encoders(folder: Path, tmp_path: Path) -> None:
    behind = load(behind_a_shift(folder, tmp_path), device="cpu")
    np.testing.assert_allclose(behind.encode("one", space="teacher"), behind.encode("one") + 1, atol=1e-6)
    unit = behind.encode(["one"], space="teacher", normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)


def test_the_stream_gives_the_teachers_space_too(folder: Path, tmp_path: Path) -> None:
    behind = load(behind_a_shift(folder, tmp_path), device="cpu")
    stream = behind.encode_stream(TEXTS, chunk=3, space="teacher", normalize=True)
    expected = behind.encode(TEXTS, space="teacher", normalize=True)
    np.testing.assert_allclose(np.concatenate(list(stream)), expected, atol=1e-6)


def test_an_unknown_space_is_an_error_before_the_work(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedder.encoder, "_batched", lambda *_, **__: pytest.fail("has worked"))
    message = "space is 'techer': known are 'trained' and 'teacher'"
    for call in (embedder.encode, embedder.encode_query, embedder.encode_stream, embedder.encoder.encode):
        with pytest.raises(SourceError, match=message):
            call(TEXTS, space="techer")  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=message):
        embedder.encoder.in_space("techer", np.zeros((1, WIDTH)))  # type: ignore[arg-type]


def test_queries_and_documents_have_the_instructions_of_retrieval(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    known = load_instructions()
    write(Path("encoder"), tiny_backbone("llama"), None, max_query_tokens=128)
    embedder = load("encoder")
    for found, side in ((embedder.encode_query(TEXTS), "query"), (embedder.encode_document(TEXTS), "document")):
        prompt = known.choose("", "Retrieval", side)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, embedder.encode(TEXTS, prompt=prompt))
        assert np.abs(found - embedder.encode(TEXTS)).max() > 1e-4


def test_a_bar_is_shown_where_it_is_asked_for(embedder: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    embedder.encode(TEXTS)
    assert capsys.readouterr().err == ""
    embedder.encode(TEXTS, show_progress=True)
    assert "encode: 100%" in capsys.readouterr().err


def test_a_stream_is_embedded_as_it_comes(embedder: Embedder) -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        number = 0
        while True:
            taken.append(number)
            yield f"text {number}"
            number += 1

    stream = embedder.encode_stream(endless(), chunk=4, prompt="Say:", normalize=True)
    assert taken == []
    first, second = next(stream), next(stream)
    assert len(taken) == 8
    expected = embedder.encode([f"text {number}" for number in range(8)], prompt="Say:", normalize=True)
    np.testing.assert_allclose(np.concatenate([first, second]), expected, atol=1e-6)
    assert [len(part) for part in embedder.encode_stream(TEXTS, chunk=3)] == [3, 1]
    assert list(embedder.encode_stream([])) == []


def test_decode_is_that_of_the_lens(embedder: Embedder) -> None:
    expected = decode(embedder.encoder, TEXTS, max_new_tokens=4, instruction="Say:")
    assert embedder.decode(TEXTS, 4, prompt="Say:") == expected
    assert embedder.decode(TEXTS[0], 4, prompt="Say:") == expected[0]


@pytest.mark.slow
def test_two_processes_embed_as_one_and_stay(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with load(folder, device="cpu") as embedder:
        texts = [*TEXTS, "x" * 500, "y" * 500]
        found = embedder.encode(texts, processes=2)
        assert "2 of 6 texts are longer than 32 tokens" in caplog.text
        np.testing.assert_allclose(found, embedder.encode(texts), atol=1e-5)
        workers = embedder._workers
        assert workers is not None
        with pytest.raises(SourceError, match=r"texts\[1\] is 7 \(int\)"):
            embedder.encode(["x", 7], processes=2)  # type: ignore[list-item]
        np.testing.assert_allclose(next(embedder.encode_stream(texts, processes=2)), found, atol=1e-5)
        assert embedder._workers is workers
    assert embedder._workers is None


@pytest.mark.slow
def test_a_call_after_one_that_failed_in_its_processes(tmp_path: Path, tiny_backbone: Callable[..., Path]) -> None:
    write(tmp_path / "encoder", tiny_backbone("llama"), None, keep="end")
    with load(tmp_path / "encoder", device="cpu") as embedder:
        expected = embedder.encode(TEXTS)
        with pytest.raises(PipelineError, match="the instruction .* takes"):
            embedder.encode(TEXTS, processes=2, prompt="p" * 100)
        assert embedder._workers is None
        stream = embedder.encode_stream(TEXTS, chunk=2, processes=2)
        np.testing.assert_allclose(next(stream), expected[:2], atol=1e-5)
        with pytest.raises(PipelineError, match="the instruction .* takes"):
            embedder.encode(TEXTS, processes=2, prompt="p" * 100)
        np.testing.assert_allclose(next(stream), expected[2:], atol=1e-5)


def test_auto_is_this_process_where_there_is_no_gpu(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.parallel.devices.visible_gpus", lambda: [])
    np.testing.assert_array_equal(embedder.encode(TEXTS, processes="auto"), embedder.encode(TEXTS))
    assert embedder._workers is None


def test_an_embedder_on_the_cpu_starts_no_worker_on_a_gpu(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("pipeline.parallel.devices.visible_gpus", lambda: ["0"])
    monkeypatch.setattr("pipeline.encoder.pool.ParallelEncoder", lambda _, devices: started.extend(devices))
    with pytest.raises(AttributeError):  # nothing embeds
        embedder.encode(TEXTS, processes=2)
    assert [device.name.split()[0] for device in started] == ["cores", "cores"]
    assert all("CUDA_VISIBLE_DEVICES" not in device.environment for device in started)


# --- similarity -----------------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine() -> None:
    a = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    b = np.array([[1.0, 0.0], [0.0, -5.0]])
    expected = [[0.6, -0.8], [0.0, -1.0], [0.0, 0.0]]
    found = similarity(a, b)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(similarity(a[0], b), expected[:1], atol=1e-7)
    assert similarity(a[:0], b).shape == (0, 2)


def test_similarity_of_other_widths() -> None:
    with pytest.raises(SourceError, match=r"shapes \[1, 2\] and \[1, 3\] cannot be compared"):
        similarity(np.ones(2), np.ones(3))
    with pytest.raises(SourceError, match="embeddings must be numbers"):
        similarity("a text", np.ones(3))  # type: ignore[arg-type]


# --- mistakes -------------------------------------------------------------------------------------------------------


def test_texts_that_are_too_long_are_counted_once_a_call(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    message = "{} of {} texts are longer than 32 tokens, prompt and template included (max_query_tokens), and"
    embedder.encode(["x" * LIMIT])
    assert caplog.messages == []
    embedder.encode(["x" * 33, "y", "z" * 9000])
    list(embedder.encode_stream(["x" * 33, "y", "z" * 9000], chunk=1))
    lost = " lose their end (keep: start)"
    assert caplog.messages == [message.format(2, 3) + lost] * 2
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    embedder.decode("x" * 33, 1)
    assert caplog.messages[2].startswith("1 of 1 texts")


MISTAKES: list[tuple[Any, str]] = [
    (["x", 3], r"texts\[1\] is 3 \(int\): every text must be a string"),
    (["x", None], r"texts\[1\] is None \(NoneType\)"),
    ([["x"]], r"texts\[0\] is \['x'\] \(list\)"),
    ([float("nan")], r"texts\[0\] is nan \(float\)"),
    (["\ud83d"], r"texts\[0\] holds '\\ud83d' at character 0, half of a surrogate pair"),
    ((text for text in TEXTS), "texts is a generator, whose length is not known: give a list, or use encode_stream"),
    ({"a": "x"}, "texts is a dict: give a string, or a list"),
    ({"x"}, "texts is a set: give a string"),
    (b"x", "texts is a bytes: give a string"),
    (7, "texts is a int: give a string"),
    (None, "texts is a NoneType: give a string"),
    (np.array("x"), "texts is a ndarray, whose length is not known: give a list"),
    (pl.DataFrame({"text": TEXTS}), "texts is a DataFrame: give a column of it"),
]


@pytest.mark.parametrize(("texts", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_is_no_text(embedder: Embedder, texts: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        embedder.encode(texts)
    assert "\n" not in str(caught.value)


def test_a_prompt_that_no_tokenizer_reads(embedder: Embedder) -> None:
    with pytest.raises(SourceError, match=r"prompt: holds '\\udce9' at character 3, half of a surrogate pair"):
        embedder.encode("x", prompt="caf\udce9")


def test_mistakes_in_a_stream(embedder: Embedder) -> None:
    stream = embedder.encode_stream(["a", "b", "c", 4], chunk=2)  # type: ignore[list-item]
    assert next(stream).shape == (2, WIDTH)
    with pytest.raises(SourceError, match=r"texts\[3\] is 4 \(int\)"):
        next(stream)
    for chunk in (0, 1.5):
        with pytest.raises(SourceError, match=f"chunk is {chunk}: it must be a whole number, at least 1"):
            embedder.encode_stream(["a"], chunk=chunk)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="texts is a DataFrame: give a column of it"):
        embedder.encode_stream(pl.DataFrame({"text": TEXTS}))  # type: ignore[arg-type]
    for wrong in ("a string", 7, {"a": "x"}, {"a"}):
        with pytest.raises(SourceError, match="give an iterable of strings"):
            embedder.encode_stream(wrong)  # type: ignore[arg-type]


def test_numbers_out_of_range(embedder: Embedder) -> None:
    with pytest.raises(SourceError, match="processes is 0: it must be a number from 1, or 'auto'"):
        embedder.encode("x", processes=0)
    with pytest.raises(SourceError, match="max_new_tokens is 0: it must be at least 1"):
        embedder.decode("x", 0)
    for given in (embedder.encode, embedder.encode_stream):
        with pytest.raises(SourceError, match=r"truncate_dim is 2\.0: it must be a whole number"):
            given(["x"], truncate_dim=2.0)  # type: ignore[operator]
    assert embedder.encode("x", truncate_dim=np.int64(2)).shape == (2,)  # type: ignore[arg-type]


def test_embeddings_that_are_not_finite_are_an_error(folder: Path) -> None:
    embedder = load(folder)
    embedder.encoder.student.alignment.bias.data[0] = float("nan")
    with pytest.raises(TrainingError, match=r"2 of 2 embeddings are not finite with the backbone in torch\.float32"):
        embedder.encode(["a", "b"])


def test_another_backbone_is_refused_or_taken_with_a_warning(
    folder: Path, tiny_backbone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_backbone("qwen3")
    with pytest.raises(PipelineError, match=r"the encoder was trained on .* allow_other_backbone=True"):
        load(folder, backbone=other)
    changed = load(folder, backbone=other, allow_other_backbone=True)
    assert "the encoder was trained on" in caplog.text
    assert np.abs(changed.encode(["x"]) - load(folder).encode(["x"])).max() > 1e-3


def test_a_dtype_of_torch_is_its_name(folder: Path) -> None:
    import torch

    assert load(folder, device="cpu", dtype=torch.bfloat16).encoder.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "mps"}, "^device: mps cannot be used here: "),
        ({"device": "gpu"}, "^device: gpu cannot be used here: "),
        ({"dtype": "float8"}, "^dtype: float8 is none of bfloat16, float16, float32$"),
    ],
)
def test_a_device_or_dtype_that_is_none_is_one_line(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
