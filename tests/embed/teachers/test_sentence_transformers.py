"""The sentence-transformers teacher: a tiny random model in memory, and (marker models) the real all-MiniLM."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.backbone.loading import BackboneParams, identify
from pipeline.core.errors import TeacherError
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.load import load_teacher

BACKBONE = BackboneParams(name="org/model")
TEXTS = ["short", "a text that is rather longer than the others here", "middle of the road", ""]


@pytest.fixture(scope="module")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random mean-pooling BERT of 16 dimensions and 64 positions; a token is a letter or a word."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab={token: i for i, token in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    transformer = Transformer(str(folder))
    saved = tmp_path_factory.mktemp("teacher")
    SentenceTransformer(modules=[transformer, Pooling(16)]).save(str(saved))
    return saved


def test_a_model_that_pools_at_its_first_token_is_read_there(tiny_teacher: Path, tmp_path: Path) -> None:
    """As bge-m3-unsupervised: CLS, then length 1."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(tiny_teacher))
    SentenceTransformer(modules=[transformer, Pooling(16, "cls"), Normalize()]).save(str(tmp_path / "cls"))
    ids = [transformer.tokenizer(text, return_tensors="pt", truncation=True, max_length=32) for text in TEXTS]
    with torch.inference_mode():
        first = torch.cat([transformer.auto_model(**each).last_hidden_state[:, 0] for each in ids])
    expected = torch.nn.functional.normalize(first).numpy()
    np.testing.assert_allclose(build(tmp_path / "cls").embed(TEXTS), expected, atol=1e-5)
    assert np.abs(build(tiny_teacher).embed(TEXTS) - first.numpy()).max() > 1e-2


def build(folder: Path | str, **keys: Any) -> Any:
    params = TeacherParams(kind="sentence-transformers", name=str(folder), **({"max_tokens": 32} | keys))
    return load_teacher(params, BACKBONE)


def test_a_batch_equals_each_text_alone(tiny_teacher: Path) -> None:
    teacher = build(tiny_teacher, batch_tokens=40)
    together = teacher.embed(TEXTS)
    assert teacher.width == 16
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, np.concatenate([teacher.embed([text]) for text in TEXTS]), atol=1e-5)
    assert teacher.embed([]).shape == (0, 16)


def test_a_pass_holds_no_more_tokens_than_the_budget(tiny_teacher: Path) -> None:
    teacher = build(tiny_teacher, batch_tokens=24, max_tokens=32)
    shapes: list[tuple[int, ...]] = []
    teacher._model[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0]["input_ids"].shape)))
    texts = ["a" * length for length in (1, 50, 6, 6, 10, 1, 6)]  # and [CLS], [SEP]; 50 letters are cut at 32 tokens
    vectors = teacher.embed(texts)
    assert shapes == [(1, 32), (2, 12), (3, 8), (1, 3)]
    np.testing.assert_allclose(vectors, np.concatenate([teacher.embed([text]) for text in texts]), atol=1e-5)


def test_prompt_and_token_limit_reach_the_model(tiny_teacher: Path) -> None:
    bare, prompted = build(tiny_teacher), build(tiny_teacher, prompt="say ")
    np.testing.assert_allclose(prompted.embed(["abc"]), bare.embed(["say abc"]), atol=1e-6)
    short = build(tiny_teacher, max_tokens=6)
    np.testing.assert_allclose(short.embed(["abcdefgh"]), short.embed(["abcd"]), atol=1e-6)
    assert short.identity["max_tokens"] == 6
    assert bare.identity != prompted.identity != short.identity


def test_lengths_count_prompt_and_special_tokens(tiny_teacher: Path) -> None:
    bare, prompted = build(tiny_teacher, max_tokens=6), build(tiny_teacher, max_tokens=6, prompt="say ")
    assert bare.token_lengths(["abcd", "abcde", ""]) == [6, 7, 2]  # and [CLS], [SEP]
    assert prompted.token_lengths(["a", "ab"]) == [6, 7]
    assert bare.token_lengths([]) == []
    np.testing.assert_allclose(bare.embed(["abcde"]), bare.embed(["abcd"]), atol=1e-6)


def test_a_limit_without_room_for_a_text_is_refused(tiny_teacher: Path) -> None:
    alone = build(tiny_teacher).token_lengths([""])[0]
    prompted = build(tiny_teacher, prompt="say ").token_lengths([""])[0]
    for taken, keys in ((alone, {}), (prompted, {"prompt": "say "})):
        with pytest.raises(TeacherError, match=rf"max_tokens: {taken} leaves no room for a text: .* take {taken}$"):
            build(tiny_teacher, max_tokens=taken, **keys)
        assert build(tiny_teacher, max_tokens=taken + 1, **keys).max_tokens == taken + 1


def test_a_model_of_static_vectors_reads_all_of_every_text(tmp_path: Path) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    from tests.conftest import tiny_tokenizer

    torch.manual_seed(0)
    static = StaticEmbedding(tiny_tokenizer(), embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    teacher = build(tmp_path / "static", max_tokens=4)
    assert teacher.token_lengths(["a" * 50]) == [50]
    assert teacher.max_tokens is teacher.identity["max_tokens"] is None
    vectors = teacher.embed(["a" * 4, "aaaab"])
    assert not np.allclose(vectors[0], vectors[1])


def test_the_models_own_limit_wins_and_is_said(tiny_teacher: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert build(tiny_teacher, max_tokens=5000).identity["max_tokens"] == 64
    assert "64 tokens a text (its own limit, below max_tokens)" in caplog.text


def test_identity_is_that_of_the_folder(tiny_teacher: Path) -> None:
    assert build(tiny_teacher).identity.items() >= identify(str(tiny_teacher), None).items()


def test_a_folder_with_damaged_weights(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "torn")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.name: cannot load .*torn': .*header"):
        build(folder)


def test_a_folder_that_is_not_there(workspace: Path) -> None:
    with pytest.raises(TeacherError, match=r"^embed\.teacher\.name: .* \./nowhere"):
        build("./nowhere")


def test_a_folder_that_holds_no_model(workspace: Path) -> None:
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{}")
    with pytest.raises(TeacherError, match=r"embed\.teacher\.name: cannot load './broken'"):
        build("./broken")


@pytest.mark.models
def test_real_teacher_equals_sentence_transformers(small_teacher: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["Paris is the capital of France.", "Boil the egg for ten minutes.", "Sorry, I cannot help. " * 40]
    expected = SentenceTransformer(str(small_teacher), device="cpu").encode(texts)
    found = build(small_teacher, max_tokens=256, batch_tokens=8).embed(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_gated_teacher_says_how_to_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.backbone.test_loading import gated_repo_error

    def refuse(*_: Any, **__: Any) -> None:
        raise gated_repo_error()

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", refuse)
    with pytest.raises(TeacherError, match=r"org/gated.*hf auth login"):
        build("org/gated")
