"""Merged checkpoints: what plain sentence-transformers, transformers and vLLM make of them equals the encoder."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.backbone.loading import BackboneParams, Template, load_tokenizer
from pipeline.backbone.lora import LoraParams
from pipeline.core.errors import ArtifactError, TrainingError
from pipeline.core.target_transform import TargetTransform
from pipeline.encoder.folder.read import read_encoder
from pipeline.export.merged.export import add_rows, export_merged, usage
from pipeline.export.merged.folder import old_rope_keys
from pipeline.export.merged.tokenizer import PROBES, Frame, find_frame
from pipeline.export.official.export import export_official
from tests.conftest import ROOT, tiny_model, tiny_tokenizer
from tests.export.encoder_folders import write_folder
from tests.vllm_server import vllm_serve

PROMPTS = {"query": "Say: ", "document": ""}
TEXTS = ["one", "What is it?", "ein längerer Text, 東京", "def f():\n    pass"]
LORA = LoraParams(rank=2, alpha=8.0)


write_model = partial(write_folder, Path("encoder"), compression_tokens=1, thought_tokens=0)


def plain(folder: Path | str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def embed(folder: Path | str, texts: list[str], **options: Any) -> np.ndarray:
    return plain(folder).encode(texts, batch_size=3, show_progress_bar=False, **options)


@pytest.mark.parametrize(
    ("architecture", "template"), [("llama", "raw"), ("qwen3", "chat"), ("gemma3", "raw"), ("gemma3", "chat")]
)
def test_one_token_in_plain_sentence_transformers(
    workspace: Path, tiny_backbone: Callable[..., Path], architecture: str, template: Template
) -> None:
    model = write_model(tiny_backbone(architecture), template=template)
    merged = export_merged(model, Path("merged"), prompts=PROMPTS)
    expected = read_encoder(model)
    found = plain("merged")
    for texts in (TEXTS, ["x" * 500, "y"]):
        np.testing.assert_allclose(found.encode(texts), expected.encode(texts), atol=1e-4)
    said = expected.encode(TEXTS, instruction="Say:")
    np.testing.assert_allclose(found.encode(TEXTS, prompt_name="query"), said, atol=1e-4)
    assert np.abs(said - expected.encode(TEXTS)).max() > 1e-3
    np.testing.assert_array_equal(found.encode(TEXTS, truncate_dim=3), found.encode(TEXTS)[:, :3])
    assert found.similarity_fn_name == "cosine"
    assert found.get_embedding_dimension() == 5
    assert found.max_seq_length == 64 + 1
    assert merged.difference < 1e-5


@pytest.mark.parametrize(("compression", "thoughts", "template"), [(3, 0, "raw"), (2, 2, "chat"), (1, 2, "raw")])
def test_several_tokens_in_plain_sentence_transformers(
    workspace: Path, tiny_backbone: Callable[..., Path], compression: int, thoughts: int, template: Template
) -> None:
    model = write_model(
        tiny_backbone("llama"), compression_tokens=compression, thought_tokens=thoughts, template=template
    )
    export_merged(model, Path("merged"), prompts=PROMPTS)
    texts = [*TEXTS, "z" * 300]
    np.testing.assert_allclose(embed("merged", texts), read_encoder(model).encode(texts), atol=1e-4)


@pytest.mark.parametrize(
    ("form", "width"), [({}, 5 + 32), ({"decorrelated": True}, 5 + 32), ({"form": "added", "mapped": True}, 5)]
)
def test_the_reading_goes_along(
    workspace: Path, tiny_backbone: Callable[..., Path], form: dict[str, Any], width: int
) -> None:
    model = write_model(tiny_backbone("llama"), compression_tokens=3, share=0.3, **form)
    merged = export_merged(model, Path("merged"), prompts=PROMPTS)
    found = plain("merged")
    assert (found.get_embedding_dimension(), merged.layout.width) == (width, width)
    np.testing.assert_allclose(found.encode(TEXTS), read_encoder(model).encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("template", ["raw", "chat"])
def test_a_long_text_loses_the_side_that_the_encoder_loses(
    workspace: Path, tiny_backbone: Callable[..., Path], template: Template
) -> None:
    model = write_model(
        tiny_backbone("llama"), compression_tokens=2, template=template, max_query_tokens=24, keep="end"
    )
    merged = export_merged(model, Path("merged"), prompts=PROMPTS)
    texts = ["the beginning of it, much more of it, and its end", "short", "z" * 300]
    np.testing.assert_allclose(embed("merged", texts), read_encoder(model).encode(texts), atol=1e-4)
    lost = "A text that is too long loses its start here, and the prompt in front of it with that"
    assert "of a longer text the start is cut" in Path("merged/README.md").read_text()
    assert lost in Path("merged/README.md").read_text()
    assert usage(Path("merged"), merged.layout)[-1].startswith(f"note: a{lost[1:]}")


@pytest.mark.slow
def test_the_folder_needs_nothing_of_ours(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    """In a process that cannot import this project."""
    model = write_model(tiny_backbone("llama"), compression_tokens=2)
    export_merged(model, Path("merged"), prompts=PROMPTS)
    code = (
        "import sys, numpy as np\n"
        "sys.modules['pipeline'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        "np.save('found.npy', SentenceTransformer('merged', device='cpu').encode(['one', 'two three']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    np.testing.assert_allclose(np.load("found.npy"), read_encoder(model).encode(["one", "two three"]), atol=1e-4)


def test_a_text_that_stands_twice_is_refused(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    model = write_model(tiny_backbone("llama"), template="echo", max_query_tokens=96)
    with pytest.raises(TrainingError, match="template echo"):
        export_merged(model, Path("merged"), prompts=PROMPTS)
    with pytest.raises(TrainingError, match="template echo"):
        export_official(model, Path("official"))
    assert not Path("merged").exists() and not Path("official").exists()


def test_adapters_are_merged(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    model = write_model(tiny_backbone("llama"), lora=LORA)
    export_merged(model, Path("merged"), prompts=PROMPTS)
    expected = read_encoder(model).encode(TEXTS)
    np.testing.assert_allclose(embed("merged", TEXTS), expected, atol=1e-4)
    plain_model = write_model(tiny_backbone("llama"))
    assert np.abs(read_encoder(plain_model).encode(TEXTS) - expected).max() > 1e-2
    assert "this is another model" in Path("merged/README.md").read_text()


def test_a_matrix_larger_than_its_tokenizer_is_never_shrunk(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_backbone("qwen3")  # 260 rows for 259 tokens
    export_merged(write_model(folder, compression_tokens=2), Path("merged"), prompts=PROMPTS)
    grown = AutoModelForCausalLM.from_pretrained("merged").get_input_embeddings().weight
    before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert len(load_tokenizer(BackboneParams(name=str(folder)))) < len(before) == 260
    assert len(grown) == 262
    assert torch.equal(grown[:260], before)
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert tokenizer("ab")["input_ids"][-2:] == [260, 261]
    assert json.loads(Path("merged/config.json").read_text())["vocab_size"] == 262


def test_a_tokenizer_larger_than_its_matrix() -> None:
    """Rows between the two are zero."""
    model = tiny_model("llama")
    before = model.get_input_embeddings().weight.clone()
    add_rows(model, torch.full((2, 32), 7.0), first=263)
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[:260], before)
    assert torch.equal(weight[260:], torch.tensor([[0.0]] * 3 + [[7.0]] * 2).expand(5, 32))
    assert torch.equal(model.get_output_embeddings().weight[260:], torch.zeros(5, 32))


def test_rows_are_stored_as_the_layer_will_scale_them() -> None:
    model = tiny_model("gemma3")
    rows = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    add_rows(model, rows, first=260)
    seen = model.get_input_embeddings()(torch.tensor([260, 261]))
    torch.testing.assert_close(seen, rows, rtol=1e-5, atol=1e-6)
    assert model.get_input_embeddings().weight[260:].norm() < rows.norm() / 5


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])  # a head of its own, a shared one
def test_the_checkpoint_writes_what_the_backbone_writes(
    workspace: Path, tiny_backbone: Callable[..., Path], architecture: str
) -> None:
    """Not what the folder is for, yet nothing is broken: the new tokens are never sampled."""
    from transformers import AutoModelForCausalLM

    folder = tiny_backbone(architecture)
    export_merged(write_model(folder, compression_tokens=3), Path("merged"), prompts=PROMPTS)
    prompt = torch.tensor([[7, 30, 41, 120]])
    texts = [
        AutoModelForCausalLM.from_pretrained(name).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=2
        )
        for name in (folder, "merged")
    ]
    assert torch.equal(*texts)


def test_no_text_can_spell_a_new_token(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    export_merged(write_model(tiny_backbone("llama")), Path("merged"), prompts=PROMPTS)
    ids = AutoTokenizer.from_pretrained("merged")("<|compression_0|>")["input_ids"]
    assert ids.count(260) == 1
    assert ids[-1] == 260
    assert len(ids) == len("<|compression_0|>") + 1


def test_a_cut_text_keeps_the_frame_and_the_new_tokens(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    model = write_model(tiny_backbone("llama"), template="chat", compression_tokens=2, max_query_tokens=20)
    export_merged(model, Path("merged"), prompts=PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained("merged")
    for ids in tokenizer(["a" * 100, "a" * 17], truncation=True, max_length=22)["input_ids"]:
        assert tokenizer.decode(ids[:-2]) == "<|user|>" + "a" * 17 + "<|end|><|bot|>"
        assert ids[-2:] == [260, 261]


def test_the_frame_of_a_template() -> None:
    tokenizer = tiny_tokenizer()
    assert find_frame(tokenizer, "raw", {}) == Frame([], [])
    assert find_frame(tokenizer, "chat", {}) == Frame([0], [2, 1])


def test_a_template_that_depends_on_the_text_is_refused() -> None:
    changing = tiny_tokenizer("{% for m in messages %}{{ m['content'] | upper }}<|end|>{% endfor %}")
    with pytest.raises(TrainingError, match=r"template chat of .* is not the same tokens around every text"):
        find_frame(changing, "chat", {})


def test_old_readers_find_how_positions_are_rotated(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    export_merged(write_model(tiny_backbone("llama")), Path("merged"), prompts=PROMPTS)
    config = json.loads(Path("merged/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    tokenizer = json.loads(Path("merged/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    assert old_rope_keys(scaled) == {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    kinds = {
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
    }
    assert old_rope_keys(kinds) == {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert old_rope_keys({}) == {}


def test_an_export_replaces_an_export_and_nothing_else(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    model = write_model(tiny_backbone("llama"))
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="notes exists already"):
        export_merged(model, Path("notes"), prompts=PROMPTS)
    with pytest.raises(ArtifactError, match="encoder exists already"):
        export_merged(model, model, prompts=PROMPTS)
    export_merged(model, Path("merged"), prompts=PROMPTS)
    first = {path.name: path.read_bytes() for path in Path("merged").iterdir() if path.is_file()}
    export_merged(model, Path("merged"), prompts=PROMPTS)
    assert first == {path.name: path.read_bytes() for path in Path("merged").iterdir() if path.is_file()}


def test_nothing_is_left_of_an_export_that_embeds_differently(
    workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tiny_backbone("llama"))
    other = torch.zeros(5, 32), torch.ones(5)
    monkeypatch.setattr("pipeline.encoder.head.EmbeddingHead.composed", lambda head: other)
    with pytest.raises(TrainingError, match="embeds differently from the encoder"):
        export_merged(model, Path("merged"), prompts=PROMPTS)
    assert not Path("merged").exists()


@pytest.mark.parametrize(("compression", "dtype"), [(1, "float16"), (3, "bfloat16")])
def test_half_precision_in_plain_sentence_transformers(
    workspace: Path, tiny_backbone: Callable[..., Path], compression: int, dtype: Any
) -> None:
    model = write_model(tiny_backbone("llama"), compression_tokens=compression, thought_tokens=1)
    export_merged(model, Path("merged"), prompts=PROMPTS, dtype=dtype)
    found = plain("merged")
    expected = read_encoder(model).encode(TEXTS)
    np.testing.assert_allclose(found.encode(TEXTS), expected, atol=0.03 * np.abs(expected).max())
    # Token weights are float32, so that several tokens are computed in it; one stays in half precision.
    assert found.dtype == (torch.float32 if compression > 1 else getattr(torch, dtype))
    said = f"Weights are {dtype}{', sentence-transformers computes with them in float32;' if compression > 1 else ';'}"
    assert said in Path("merged/README.md").read_text()


def test_vllm_reads_the_length_of_a_folder_that_says_more(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    config = pytest.importorskip("vllm.transformers_utils.config")
    model = write_model(tiny_backbone("llama"), compression_tokens=3)
    export_merged(model, Path("merged"), prompts=PROMPTS, dtype="bfloat16")
    read = config.get_sentence_transformer_tokenizer_config(str(Path("merged").resolve()))
    assert (read["max_seq_length"], read["do_lower_case"]) == (64 + 3, False)


def test_weights_are_rounded_last(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    model = write_model(tiny_backbone("llama"))
    merged = export_merged(model, Path("merged"), prompts=PROMPTS, dtype="bfloat16")
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file("merged/model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    tokens = load_file("encoder/student.safetensors")["tokens"]
    assert torch.equal(tensors["model.embed_tokens.weight"][260:], tokens.bfloat16())
    # What is said of the difference is of what was written.
    from sentence_transformers import SentenceTransformer

    written = SentenceTransformer("merged", device="cpu", model_kwargs={"dtype": "float32"}).encode(PROBES[:1])
    expected = read_encoder(model).encode(PROBES[:1])
    difference = np.linalg.norm(written - expected) / np.linalg.norm(expected)
    assert 1e-4 < 0.999 * difference <= merged.difference < 0.1


def test_the_command(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    model = write_model(tiny_backbone("llama"), compression_tokens=2)
    done = CliRunner().invoke(app, ["export-merged", str(model), "merged", "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert (
        "merged: with weights rounded to bfloat16, its embeddings in float32 are the encoder's up to 0.0" in done.stdout
    )
    done = CliRunner().invoke(app, ["export-merged", str(model), "merged"])
    assert done.exit_code == 0, done.output
    assert "merged: its embeddings in float32 are the encoder's up to " in done.stdout
    assert "mean of the last 2, see merged/README.md" in done.stdout
    prompts = json.loads(Path("merged/config_sentence_transformers.json").read_text())["prompts"]
    assert prompts["query"] == "Generate a passage that best answers this question: "
    failed = CliRunner().invoke(app, ["export-merged", "none", "other"])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: none is not an encoder")
    failed = CliRunner().invoke(app, ["export-merged", str(model), "other", "--dtype", "half"])
    assert failed.stderr.startswith("error: --dtype: unknown value 'half'")


VLLM = """
import json, sys
import numpy as np
from pipeline.generate.engines.vllm_environment import set_environment

if __name__ == "__main__":
    folder, count, texts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    set_environment(on_gpu=False, batch_invariant=False)
    from vllm import LLM
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(task="token_embed", use_activation=False)
    options = dict(runner="pooling", dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**27, max_num_seqs=4)
    llm = LLM(folder, pooler_config=pooler, **options)
    cut = {"truncate_prompt_tokens": -1}
    outputs = llm.encode(texts, pooling_task="token_embed", tokenization_kwargs=cut)
    vectors = [output.outputs.data[-count:].mean(dim=0).tolist() for output in outputs]
    np.save("vllm.npy", np.array(vectors, dtype=np.float32))
"""
QUESTIONS = ["What is the capital of France?", "Why is the sky blue?", "rain", "again and " * 100]


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.models
@pytest.mark.slow
def test_vllm_gives_our_embedding(workspace: Path, small_lm: Path) -> None:
    pytest.importorskip("vllm")
    model = write_model(small_lm, compression_tokens=3, max_query_tokens=64, width=24)
    export_merged(model, Path("merged"), prompts=PROMPTS, dtype="bfloat16")
    expected = embed("merged", QUESTIONS)
    Path("run.py").write_text(VLLM)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "run.py", str(Path("merged").resolve()), "3", json.dumps(QUESTIONS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    close(np.load("vllm.npy"), expected)
    shutil.rmtree("merged")


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "template"), [(1, "raw"), (3, "chat")])
def test_a_vllm_server_gives_our_embedding(workspace: Path, small_lm: Path, count: int, template: Template) -> None:
    """One token by the OpenAI client, several by /pooling, as the README of the folder says."""
    pytest.importorskip("vllm")
    import httpx
    from openai import OpenAI

    turned = TargetTransform("rotate", False, np.zeros(24, np.float32), *[np.eye(24, dtype=np.float32)] * 2)
    model = write_model(
        small_lm, compression_tokens=count, template=template, max_query_tokens=64, width=24, transform=turned
    )
    export_merged(model, Path("merged"), prompts=PROMPTS)
    expected = read_encoder(model).encode(QUESTIONS)
    whole = {"truncate_prompt_tokens": -1}
    pooler = ["--pooler-config", '{"task": "token_embed", "use_activation": false}'] if count > 1 else []
    with vllm_serve(Path("merged").resolve(), Path("server.log"), "--runner", "pooling", *pooler) as url:
        if count == 1:
            embeddings = OpenAI(base_url=url, api_key="none").embeddings
            answer = embeddings.create(model="small", input=QUESTIONS, extra_body=whole)
            close([row.embedding for row in answer.data], expected)
            answer = embeddings.create(model="small", input=QUESTIONS[:2], dimensions=8)
            close([row.embedding for row in answer.data], expected[:2, :8])
        else:
            content = {"model": "small", "input": QUESTIONS, "task": "token_embed", **whole}
            rows = httpx.post(url.replace("/v1", "/pooling"), json=content, timeout=60).json()["data"]
            close([np.mean(row["data"][-count:], axis=0) for row in rows], expected)
    close(embed("merged", QUESTIONS), expected)
    shutil.rmtree("merged")
