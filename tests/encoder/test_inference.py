"""The encoder in use, on a tiny backbone."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.backbone.loading import BackboneParams, Keep, Pool, Template, identify, load_backbone, load_tokenizer
from pipeline.backbone.lora import LoraParams, adapter_parameters, add_adapter
from pipeline.core.artifacts import create
from pipeline.core.errors import BackboneError, TrainingError
from pipeline.core.target_transform import TargetTransform
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.folder.write import write_encoder
from pipeline.encoder.inference import Encoder
from pipeline.encoder.passes.plain import PlainQueryPass, plain_passes
from pipeline.encoder.passes.prompt_reader import PaddedReader
from pipeline.encoder.student import new_student
from pipeline.lens import decode, decode_soft_prompts
from tests.conftest import tiny_model, tiny_tokenizer


def make_encoder(
    architecture: str = "qwen3",
    template: Template = "chat",
    max_query_tokens: int = 32,
    keep: Keep = "start",
    pool: Pool = "tokens",
) -> Encoder:
    """An untrained encoder on a tiny backbone."""
    model = tiny_model(architecture)
    config = EncoderConfig(
        backbone={"name": "tiny"}, chat_template_kwargs={}, template=template,
        max_query_tokens=max_query_tokens, keep=keep, pool=pool, compression_tokens=3, thought_tokens=1,
        hidden=32, width=5, teacher={"name": "t"},
    )  # fmt: skip
    student = new_student(model, 5, compression_tokens=3, thought_tokens=1, seed=0)
    return Encoder(model, tiny_tokenizer(), student, config, {"name": "tiny"})


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_encoder()


def test_without_a_transform_both_spaces_are_one(encoder: Encoder) -> None:
    np.testing.assert_array_equal(encoder.encode(["a"], space="teacher"), encoder.encode(["a"]))
    assert encoder.width_of("teacher") == 5


def test_a_transform_that_is_not_the_recorded_one(encoder: Encoder, tmp_path: Path) -> None:
    mapped = [TargetTransform("center", flag, *[np.ones(5, np.float32)] * 3) for flag in (False, True)]
    config = encoder.config.model_copy(update={"transform": mapped[0].identity})
    parts = (encoder.model, encoder.tokenizer, encoder.student, config, {})
    for folder, present in ((None, None), (tmp_path, None), (tmp_path, mapped[1])):
        if present:
            present.save(tmp_path)
        behind = Encoder(*parts, folder=folder)
        assert behind.encode(["a"]).shape == (1, 5)
        with pytest.raises(TrainingError, match=r"transform\.safetensors is missing or not the one"):
            behind.encode(["a"], space="teacher")
    mapped[0].save(tmp_path)
    behind = Encoder(*parts, folder=tmp_path).untrained(3)
    np.testing.assert_allclose(behind.encode(["a"], space="teacher") - 1, behind.encode(["a"]), atol=1e-6)


def test_encode_is_batch_independent_and_in_order(encoder: Encoder) -> None:
    texts = ["a", "a longer text than the others", "mid size", ""]
    together = encoder.encode(texts)
    assert together.shape == (4, 5)
    assert together.dtype == np.float32
    for row, text in enumerate(texts):
        np.testing.assert_allclose(encoder.encode([text])[0], together[row], atol=1e-5)


@pytest.mark.parametrize("template", ["raw", "chat"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_however_texts_are_batched_they_embed_as_the_definition_says(architecture: str, template: Template) -> None:
    """Against a padded pass of one text at a time; the instruction is longer than gemma3's window."""
    encoder = make_encoder(architecture, template, max_query_tokens=64)
    instruction = "Generate a passage that answers:"
    texts = ["same size", "long " * 9, "size same", "", "a", "long " * 200]
    plain = plain_passes(encoder.model)
    expected = []
    for text in texts:
        prompt = encoder._format(f"{instruction} {text}").token_ids
        hidden = plain.query_pass([prompt], encoder.student.tokens, 3)
        expected.append(encoder.student.embedding(encoder.student.soft_prompts(hidden))[0].detach().numpy())
    for limit in (None, 1, 60):
        found = encoder.encode(texts, instruction=instruction, batch_tokens=limit)
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=str(limit))


@pytest.mark.parametrize("pool", get_args(Pool))
def test_a_text_that_stands_twice_is_read_the_second_time(pool: Pool) -> None:
    """Against the backbone's own states of one text at a time, at places that are counted in characters."""
    encoder = make_encoder("llama", "echo", max_query_tokens=120, pool=pool)
    texts = ["same size", "a longer text than the others", "size same", "s", "", "long " * 40]
    model, tokens, expected, kept = encoder.model, encoder.student.tokens, [], []
    for text in texts:
        kept.append(text[: (120 - len("Say: Rewrite the sentence: , rewritten sentence: ") - 3) // 2])
        prompt = f"<|user|>Say: Rewrite the sentence: {kept[-1]}, rewritten sentence: {kept[-1]}<|end|><|bot|>"
        ids = torch.tensor(encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        embeds = torch.cat([model.get_input_embeddings()(ids), tokens])[None]
        [states] = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
        second, new = states[len(ids) - 2 - len(kept[-1]) - 1 : len(ids) - 2], states[-3:]  # a space goes with a text
        pooled = {"tokens": new, "text": second, "both": torch.cat([second, new])}[pool].mean(0)
        soft = encoder.student.soft_prompts(new[None])
        embedding = encoder.student.alignment(encoder.student.reconstruction(pooled))
        expected.append((embedding.detach().numpy(), soft[0].detach().numpy()))
    embeddings, soft_prompts = zip(*expected, strict=True)
    for limit in (None, 1, 200):
        found = encoder.encode(texts, instruction="Say:", batch_tokens=limit)
        np.testing.assert_allclose(found, embeddings, atol=2e-5, err_msg=str(limit))
    np.testing.assert_allclose(encoder.soft_prompts(texts, instruction="Say:"), soft_prompts, atol=2e-5)
    assert len(kept[-1]) == 34 and kept[:5] == texts[:5]


class CountingReader:
    """`PaddedReader` or `PackedReader` that counts the tokens of each pass."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.padded = reader, reader.padded
        self.begun: list[int] = []
        self.read_rows: list[list[int]] = []

    def begin(self, ids: Sequence[int]) -> Any:
        self.begun.append(len(ids))
        return self.reader.begin(ids)

    def read(
        self, beginning: Any, rests: Sequence[Sequence[int]], tokens: torch.Tensor, count: int, pooled: Any = None
    ) -> torch.Tensor:
        self.read_rows.append([len(ids) for ids in rests])
        return self.reader.read(beginning, rests, tokens, count, pooled)


@pytest.mark.parametrize("padded", [False, True])
def test_passes_hold_few_tokens_the_longest_first(padded: bool) -> None:
    encoder = make_encoder(template="raw", max_query_tokens=64)
    reader = CountingReader(PaddedReader(PlainQueryPass(encoder.model)) if padded else encoder._reader)
    encoder._reader = reader
    texts = [letter * length for letter, length in zip("abcdefg", (1, 2, 3, 10, 11, 20, 60), strict=True)]
    encoder.encode(texts, batch_tokens=32)  # each text has 4 new tokens
    assert reader.read_rows == [[60], [20], [11, 10], [3, 2, 1]]
    reader.read_rows.clear()
    encoder.encode(texts, batch_tokens=29)
    assert reader.read_rows == ([[60], [20], [11], [10, 3], [2, 1]] if padded else [[60], [20], [11, 10], [3, 2, 1]])


def test_what_all_texts_begin_with_is_read_once_where_that_pays() -> None:
    encoder = make_encoder(template="raw", max_query_tokens=64)
    encoder._reader = reader = CountingReader(encoder._reader)
    encoder.encode(["beginning a", "beginning bc"])
    assert (reader.begun, reader.read_rows) == ([0], [[12, 11]])
    encoder.encode([f"beginning {letter}" for letter in "abcdefgh"], batch_tokens=25)
    assert (reader.begun, reader.read_rows[1:]) == ([0, 10], [[1] * 5, [1] * 3])


def test_encode_of_nothing(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 5)


def test_an_empty_text_under_the_raw_template_reads_as_eos(encoder: Encoder) -> None:
    config = encoder.config.model_copy(update={"template": "raw"})
    raw = Encoder(encoder.model, encoder.tokenizer, encoder.student, config, {})
    hidden = plain_passes(encoder.model).query_pass([[encoder.tokenizer.eos_token_id]], encoder.student.tokens, 3)
    expected = encoder.student.embedding(encoder.student.soft_prompts(hidden))[0].detach().numpy()
    np.testing.assert_allclose(raw.encode(["", "b"])[0], expected, atol=1e-5)
    assert raw.encode([""]).shape == (1, 5)


def test_instruction_is_part_of_the_input(encoder: Encoder) -> None:
    np.testing.assert_array_equal(encoder.encode(["q"], instruction="Say:"), encoder.encode(["Say: q"]))
    assert np.abs(encoder.encode(["q"], instruction="Say:") - encoder.encode(["q"])).max() > 1e-4


def test_long_text_keeps_its_compression_tokens(encoder: Encoder) -> None:
    """Truncation takes the text's end, never the new tokens: the cut text embeds like its kept beginning."""
    kept = 32 - 3
    np.testing.assert_allclose(encoder.encode(["x" * 500]), encoder.encode(["x" * kept]), atol=1e-6)


@pytest.mark.parametrize("template", ["raw", "chat"])
@pytest.mark.parametrize("keep", ["start", "end"])
def test_a_long_text_embeds_as_the_side_that_is_kept(template: Template, keep: Keep) -> None:
    encoder = make_encoder(template=template, keep=keep)
    text = "the beginning of it, much more of it, and its end"
    room = 32 - (3 if template == "chat" else 0)
    side = text[:room] if keep == "start" else text[-room:]
    np.testing.assert_allclose(encoder.encode([text, "x"]), encoder.encode([side, "x"]), atol=1e-6)
    assert encoder.embed([text, "x", side]).truncated == 1
    said = "Say: " + text[: room - 5] if keep == "start" else "Say: " + text[-(room - 5) :]
    np.testing.assert_allclose(encoder.encode([text], instruction="Say:"), encoder.encode([said]), atol=1e-6)


def test_an_instruction_that_leaves_a_text_no_room() -> None:
    encoder = make_encoder(keep="end")
    with pytest.raises(BackboneError, match="takes 33 tokens, template included, the limit is 32"):
        encoder.encode(["x" * 40], instruction="i" * 29)


def test_every_use_counts_texts_that_were_cut(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    for use in (encoder.encode, encoder.soft_prompts, encoder.hidden_states):
        use(["x" * 40, "y"])
    assert len(caplog.messages) == 3
    assert all(line.startswith("1 of 2 texts are longer than 32 tokens") for line in caplog.messages)


def test_embedding_is_the_head_of_the_soft_prompts(encoder: Encoder) -> None:
    soft = torch.from_numpy(encoder.soft_prompts(["q"]))
    with torch.no_grad():
        np.testing.assert_allclose(encoder.student.embedding(soft).numpy(), encoder.encode(["q"]), atol=1e-6)


def test_untrained_shares_the_backbone(encoder: Encoder) -> None:
    other = encoder.untrained(seed=3)
    assert other.model is encoder.model
    assert np.abs(other.encode(["q"]) - encoder.encode(["q"])).max() > 1e-3
    np.testing.assert_array_equal(other.encode(["q"]), encoder.untrained(seed=3).encode(["q"]))


def test_decode_equals_a_greedy_loop_without_a_cache(encoder: Encoder) -> None:
    soft = encoder.soft_prompts(["first", "second query"])
    expected = [greedy(encoder, torch.from_numpy(row), 6) for row in soft]
    assert decode_soft_prompts(encoder, soft, max_new_tokens=6) == expected
    assert decode(encoder, ["first", "second query"], max_new_tokens=6) == expected


@torch.no_grad()
def greedy(encoder: Encoder, soft: torch.Tensor, steps: int) -> str:
    embeds, ids = soft[None], []
    for _ in range(steps):
        token = int(encoder.model(inputs_embeds=embeds).logits[0, -1].argmax())
        if token == encoder.tokenizer.eos_token_id:
            break
        ids.append(token)
        embeds = torch.cat([embeds, encoder.model.get_input_embeddings()(torch.tensor([[token]]))], dim=1)
    return encoder.tokenizer.decode(ids, skip_special_tokens=True).strip()


LORA = LoraParams(rank=2, alpha=4.0)


def write(out: Path, folder: Path, lora: LoraParams | None, max_query_tokens: int = 32, keep: Keep = "start") -> Any:
    """An encoder on the backbone of `folder`; returns its adapted backbone, if any."""
    params = BackboneParams(name=str(folder), dtype="float32")
    backbone = load_backbone(params)
    config = EncoderConfig(
        backbone=identify(str(folder), None), chat_template_kwargs={}, template="raw",
        max_query_tokens=max_query_tokens, keep=keep, compression_tokens=2, thought_tokens=1, hidden=32, width=5,
        teacher={"name": "t"}, lora=lora,
    )  # fmt: skip
    student = new_student(backbone, 5, compression_tokens=2, thought_tokens=1, seed=0)
    adapted = add_adapter(backbone, **lora.model_dump(), seed=0) if lora else None
    for name, parameter in adapter_parameters(adapted).items() if adapted else ():
        torch.nn.init.normal_(parameter, std=0.1) if "lora_B" in name else None
    adapter = adapter_parameters(adapted) if adapted else None
    with create(out, kind="encoder", params={}) as writer:
        write_encoder(writer, student, load_tokenizer(params), config, rows=1, steps=1, adapter=adapter)
    return adapted


def test_an_adapter_embeds_and_the_backbone_alone_decodes(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write(Path("plain"), tiny_backbone("llama"), None)
    adapted = write(Path("lora"), tiny_backbone("llama"), LORA)
    plain, encoder = read_encoder(Path("plain")), read_encoder(Path("lora"))
    [ids] = encoder.tokenizer(["q"])["input_ids"]
    with torch.no_grad():
        hidden = plain_passes(adapted).query_pass([ids], encoder.student.tokens, 2)
    np.testing.assert_allclose(encoder.hidden_states(["q"]), hidden.numpy(), atol=1e-5)
    assert np.abs(encoder.encode(["q"]) - plain.encode(["q"])).max() > 1e-3
    soft = encoder.soft_prompts(["q"])
    assert decode_soft_prompts(encoder, soft, max_new_tokens=5) == decode_soft_prompts(plain, soft, max_new_tokens=5)
    np.testing.assert_array_equal(encoder.untrained(3).encode(["q"]), plain.untrained(3).encode(["q"]))


def test_the_identity_of_an_encoder_covers_its_adapter(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write(Path("first"), tiny_backbone("llama"), LORA)
    write(Path("second"), tiny_backbone("llama"), LORA)
    first, second = read_encoder(Path("first")), read_encoder(Path("second"))
    assert all(torch.equal(a, b) for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True))
    assert first.identity["sha256"] != second.identity["sha256"]
    assert "LoRA adapters of rank 2" in Path("first/README.md").read_text()
    assert "  " not in Path("first/README.md").read_text()


def test_a_folder_written_before_there_were_adapters_loads(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    write(Path("encoder"), tiny_backbone("llama"), None)
    file = Path("encoder/encoder_config.json")
    content = json.loads(file.read_text())
    del content["lora"], content["keep"]
    expected = read_encoder(Path("encoder")).encode(["q"])
    file.write_text(json.dumps(content))
    np.testing.assert_array_equal(read_encoder(Path("encoder")).encode(["q"]), expected)


@pytest.fixture
def with_own_code(workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder folder whose backbone brings its own classes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(workspace / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    folder = shutil.copytree(tiny_backbone("llama"), Path("own"))
    (folder / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnBody(LlamaModel):\n    config_class = OwnConfig\n"
    )
    content = json.loads((folder / "config.json").read_text())
    content |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "own_code.OwnConfig",
            "AutoModelForCausalLM": "own_code.OwnModel",
            "AutoModel": "own_code.OwnBody",
        },
    }
    (folder / "config.json").write_text(json.dumps(content))
    write(Path("encoder"), tiny_backbone("llama"), None)
    file = Path("encoder/encoder_config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"backbone": identify(str(folder), None)}))
    return Path("encoder")


def test_code_of_a_backbone_runs_for_the_caller_who_says_so_only(with_own_code: Path) -> None:
    with pytest.raises(BackboneError, match="contains custom code"):
        read_encoder(Path("encoder"))
    assert type(read_encoder(Path("encoder"), trust_remote_code=True).model).__name__ == "OwnModel"
    Path("texts.txt").write_text("one\n")
    command = ["encode", "--model", "encoder", "--input", "texts.txt", "--output", "out.npy"]
    assert "--trust-remote-code" in CliRunner().invoke(app, command).stderr
    assert CliRunner().invoke(app, [*command, "--trust-remote-code"]).exit_code == 0
    assert np.load("out.npy").shape == (1, 5)


def test_code_of_a_backbone_goes_into_a_merged_checkpoint_for_the_caller_who_says_so_only(with_own_code: Path) -> None:
    from sentence_transformers import SentenceTransformer

    command = ["export-merged", str(with_own_code), "merged"]
    assert "--trust-remote-code" in CliRunner().invoke(app, command).stderr
    done = CliRunner().invoke(app, [*command, "--trust-remote-code"])
    assert done.exit_code == 0, done.output
    merged = SentenceTransformer("merged", device="cpu", trust_remote_code=True)
    expected = read_encoder(with_own_code, trust_remote_code=True).encode(["one"])
    np.testing.assert_allclose(merged.encode(["one"], show_progress_bar=False), expected, atol=1e-4)
    assert "trust_remote_code=True" in Path("merged/README.md").read_text()


def test_the_format_of_the_authors_has_no_backbone_with_code_of_its_own(with_own_code: Path) -> None:
    refused = CliRunner().invoke(app, ["export-official", str(with_own_code), "theirs"])
    assert (refused.exit_code, refused.stderr) == (
        1,
        "error: 'own' brings its own code, which their package does not run\n",
    )
