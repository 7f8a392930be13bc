"""The encoder folder in plain sentence-transformers: the same embeddings, with nothing of this project."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backbone.loading import BackboneParams, Keep, Pool, Template, identify, load_backbone, load_tokenizer
from pipeline.backbone.lora import LoraParams
from pipeline.core.artifacts import create, open_artifact
from pipeline.core.errors import ArtifactError
from pipeline.core.target_transform import TargetTransform
from pipeline.encoder.folder.card import NO_RESULTS
from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.folder.st_files import module_file, st_prompts
from pipeline.export.publish import publish
from pipeline.lens import decode_soft_prompts
from pipeline.tasks.instructions import load_instructions
from tests.evaluate.fakes import retrieval_folder, sts_folder
from tests.export.encoder_folders import write_folder

TEXTS = [
    "a",
    "Why is the sky blue?",
    "<|end|> and <|bot|>",
    "",
    "mid size ünïcode ✓",
    "long " * 40,
    "a much longer text than the others",
]
LORA = LoraParams(rank=2, alpha=4.0)


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers puts the code of folders."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        patch.setattr("sys.path", [*sys.path])
        yield


write = partial(write_folder, max_query_tokens=96, width=6)


def load(folder: Path, **model_kwargs: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    device = None if "device_map" in model_kwargs else "cpu"
    return SentenceTransformer(str(folder), trust_remote_code=True, device=device, model_kwargs=model_kwargs)


def test_a_folder_says_which_versions_it_needs_and_the_library_checks_them(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"))
    file = folder / "config_sentence_transformers.json"
    config = json.loads(file.read_text())
    assert set(config["requirements"]) == {"sentence-transformers", "transformers"}
    assert config["__version__"]["transformers"] == version("transformers")
    config["requirements"]["transformers"]["specifier"] = ">=99"
    file.write_text(json.dumps(config))
    with pytest.raises(ImportError, match=r"transformers>=99, but transformers==.* is installed"):
        load(folder)


def test_versions_that_do_not_read_the_requirements_are_refused_by_the_module(
    workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, with the version that is needed and the one that is there."""
    folder = write(Path("encoder"), tiny_backbone("llama"))
    requirements = json.loads((folder / "config_sentence_transformers.json").read_text())["requirements"]
    assert {name: each["specifier"] for name, each in requirements.items()} == {
        "sentence-transformers": ">=5.4", "transformers": ">=5.19"
    }  # fmt: skip
    content = compile((folder / "st_module.py").read_text(), "st_module.py", "exec")
    module: dict[str, Any] = {"__name__": "st_module"}
    exec(content, module)
    monkeypatch.setattr("transformers.__version__", "4.56.2")
    with pytest.raises(ImportError, match=r"^[^\n]* transformers 5 or later, 4\.56\.2 is installed$"):
        module["LLM2VecGenEncoder"].load(str(folder))
    monkeypatch.setattr("sentence_transformers.__version__", "5.1.2")
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.modules", None)
    with pytest.raises(ImportError, match=r"^[^\n]* sentence-transformers 5\.4 or later, 5\.1\.2 is installed$"):
        exec(content, {"__name__": "st_module"})


def test_a_folder_that_the_library_saved_again_has_a_portable_tokenizer(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    load(write(Path("encoder"), tiny_backbone("llama"))).save("again")
    for folder in ("encoder", "again"):
        settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "local_files_only" not in settings


# --- the same embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "template"), [("llama", "raw"), ("qwen3", "chat"), ("gemma3", "raw"), ("gemma3", "chat")]
)
def test_embeddings_equal_ours(
    workspace: Path, tiny_backbone: Callable[..., Path], architecture: str, template: Template
) -> None:
    folder = write(Path("encoder"), tiny_backbone(architecture), template=template)
    encoder, model = read_encoder(folder), load(folder)
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=4), encoder.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(model.encode("a"), encoder.encode(["a"])[0], atol=1e-5)
    np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=4), model.encode(TEXTS)[:, :4])
    instructions = load_instructions()
    for found, instruction in (
        (model.encode_query(TEXTS), instructions.types["Retrieval"].query),
        (model.encode_document(TEXTS), instructions.document),
        (model.encode(TEXTS, prompt_name="STS"), instructions.types["STS"].query),
    ):
        np.testing.assert_allclose(found, encoder.encode(TEXTS, instruction=instruction), atol=1e-5)
    assert (model.get_embedding_dimension(), model.max_seq_length, model.similarity_fn_name) == (6, 96, "cosine")


def test_behind_a_transform_the_folder_embeds_in_the_trained_space(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    """As it does without; the way back goes with a folder that is given away."""
    plain = load(write(Path("plain"), tiny_backbone("llama"))).encode(TEXTS)
    transform = TargetTransform("center", False, *[np.ones(6, np.float32)] * 3)
    folder = write(Path("behind"), tiny_backbone("llama"), transform=transform)
    np.testing.assert_array_equal(load(folder).encode(TEXTS), plain)
    publish(folder, Path("given"))
    given = read_encoder(Path("given"))
    np.testing.assert_allclose(given.encode(TEXTS), plain, atol=1e-5)
    np.testing.assert_allclose(given.encode(TEXTS, space="teacher"), plain + 1, atol=1e-5)
    assert "transform `center`" in (Path("given") / "README.md").read_text()


@pytest.mark.parametrize(("pool", "keep"), [("both", "start"), ("text", "end")])
def test_a_text_that_stands_twice_embeds_as_ours(
    workspace: Path, tiny_backbone: Callable[..., Path], pool: Pool, keep: Keep
) -> None:
    folder = write(Path("echo"), tiny_backbone("qwen3"), template="echo", pool=pool, keep=keep)
    encoder, model = read_encoder(folder), load(folder)
    np.testing.assert_allclose(model.encode(TEXTS, batch_size=4), encoder.encode(TEXTS), atol=1e-5)
    found = model.encode(TEXTS, prompt="Say: ")
    np.testing.assert_allclose(found, encoder.encode(TEXTS, instruction="Say:"), atol=1e-5)
    soft = torch.stack(model.encode(TEXTS, output_value="token_embeddings"))
    np.testing.assert_allclose(soft, encoder.soft_prompts(TEXTS), atol=1e-4)


def test_the_reading_beside_the_prediction_embeds_and_the_prediction_decodes(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    folder = write(Path("mixed"), tiny_backbone("llama"), share=0.3, template="echo", pool="both")
    added = write(Path("added"), tiny_backbone("llama"), share=0.3, form="added", width=32)
    mapped = write(Path("mapped"), tiny_backbone("llama"), share=0.3, form="added", mapped=True)
    decorrelated = write(Path("decorrelated"), tiny_backbone("llama"), share=0.3, decorrelated=True)
    for summed, width in ((added, 32), (mapped, 6), (decorrelated, 6 + 32)):
        np.testing.assert_allclose(load(summed).encode(TEXTS), read_encoder(summed).encode(TEXTS), atol=1e-5)
        assert load(summed).get_embedding_dimension() == width
        load(summed).save("saved")
        np.testing.assert_array_equal(load(Path("saved")).encode(TEXTS), load(summed).encode(TEXTS))
        shutil.rmtree("saved")
    encoder, model = read_encoder(folder), load(folder)
    assert model.get_embedding_dimension() == 6 + 32
    np.testing.assert_allclose(model.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    soft = torch.stack(model.encode(TEXTS, output_value="token_embeddings"))
    np.testing.assert_allclose(soft, encoder.soft_prompts(TEXTS), atol=1e-4)
    model.save("again")
    np.testing.assert_array_equal(load(Path("again")).encode(TEXTS), model.encode(TEXTS))
    publish(folder, Path("given"))
    np.testing.assert_array_equal(load(Path("given")).encode(TEXTS), model.encode(TEXTS))
    assert not (Path("given") / "start.safetensors").exists()
    (folder / "reading.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no reading\.safetensors"):
        load(folder)


def test_adapters_embed_and_do_not_decode(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    plain = load(write(Path("plain"), tiny_backbone("llama")))
    folder = write(Path("lora"), tiny_backbone("llama"), lora=LORA)
    encoder, model = read_encoder(folder), load(folder)
    np.testing.assert_allclose(model.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert np.abs(model.encode(["a"]) - plain.encode(["a"])).max() > 1e-3
    soft = encoder.soft_prompts(TEXTS)
    np.testing.assert_allclose(torch.stack(model.encode(TEXTS, output_value="token_embeddings")), soft, atol=1e-4)
    expected = decode_soft_prompts(encoder, soft, max_new_tokens=6)
    assert model[0].decode(torch.from_numpy(soft), max_new_tokens=6) == expected
    assert plain[0].decode(torch.from_numpy(soft), max_new_tokens=6) == expected
    np.testing.assert_allclose(model.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        f"0.head.{name}" for name, _ in model[0].head.named_parameters()
    }


def greedy(model: Any, soft: torch.Tensor, count: int) -> list[int]:
    """The likeliest token, `count` times, after soft prompts `[n, d]`."""
    ids: list[int] = []
    with torch.inference_mode():
        for _ in range(count):
            row = torch.cat([soft, model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))])
            ids.append(int(model(inputs_embeds=row[None]).logits[0, -1].argmax()))
    return ids


def test_decoding_heeds_every_end_and_nothing_else_of_the_backbones_own_settings(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    own = Path(shutil.copytree(tiny_backbone("llama"), "own"))
    params = BackboneParams(name=str(own), dtype="float32")
    model, tokenizer = load_backbone(params), load_tokenizer(params)
    soft = read_encoder(write(Path("plain"), own)).soft_prompts(TEXTS)
    rows = [greedy(model, row, 30) for row in torch.from_numpy(soft)]
    assert any(len(set(row)) < len(row) for row in rows)  # some repeat themselves
    end = rows[0][4]
    ends = [next((at for at, token in enumerate(row) if token in (2, end)), 30) for row in rows]
    assert ends[0] in range(1, 5)
    kept = [row[:at] for row, at in zip(rows, ends, strict=True)]
    expected = [text.strip() for text in tokenizer.batch_decode(kept, skip_special_tokens=True)]
    settings = {"eos_token_id": [2, end], "repetition_penalty": 50.0, "no_repeat_ngram_size": 1}
    (own / "generation_config.json").write_text(json.dumps(settings))
    folder = write(Path("encoder"), own)
    assert load(folder)[0].decode(torch.from_numpy(soft), max_new_tokens=30) == expected
    assert decode_soft_prompts(read_encoder(folder), soft, max_new_tokens=30) == expected


def test_adapters_without_peft(
    workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(Path("lora"), tiny_backbone("llama"), lora=LORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="LoRA adapters, which need peft: pip install peft"):
        load(folder)


def test_padding_may_be_on_either_side(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    model = load(write(Path("encoder"), tiny_backbone("gemma3")))
    left = model.preprocess(["short", "a text of another length"])
    right = {key: torch.zeros_like(value) for key, value in left.items()}
    for row, mask in enumerate(left["attention_mask"]):
        for key, value in left.items():
            right[key][row, : int(mask.sum())] = value[row, mask == 1]
    assert left["attention_mask"][0, 0] == 0 == right["attention_mask"][0, -1]
    with torch.no_grad():
        torch.testing.assert_close(model(right)["sentence_embedding"], model(left)["sentence_embedding"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_what_was_trained_stays_in_float32(
    workspace: Path, tiny_backbone: Callable[..., Path], dtype: Any
) -> None:
    folder = write(Path("encoder"), tiny_backbone("qwen3"))
    model = load(folder, dtype=dtype)
    expected = read_encoder(folder, dtype=dtype).encode(TEXTS)
    found = model.encode(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())
    halved = load(folder).to(getattr(torch, dtype))
    np.testing.assert_allclose(halved.encode(TEXTS), found, atol=0.02)
    assert {value.dtype for value in halved[0].head.parameters()} == {torch.float32}
    assert halved.dtype == getattr(torch, dtype)
    placed = load(folder, dtype=dtype, device_map="cpu")
    np.testing.assert_array_equal(placed.encode(TEXTS), found)


def test_what_was_trained_can_be_trained_on(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    """And nothing else: losses of sentence-transformers reach the tokens through the frozen backbone."""
    model = load(write(Path("encoder"), tiny_backbone("llama")))
    model.train()
    model(model.preprocess(["a", "bc"]))["sentence_embedding"].square().sum().backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()} == {
        f"0.head.{name}" for name, _ in model[0].head.named_parameters()
    }


@pytest.mark.slow
def test_several_processes_embed_as_one(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    model = load(write(Path("encoder"), tiny_backbone("llama")))
    np.testing.assert_allclose(model.encode(TEXTS, device=["cpu", "cpu"]), model.encode(TEXTS), atol=1e-5)


@pytest.mark.models
@pytest.mark.slow
def test_a_real_model_embeds_the_same(workspace: Path, small_lm: Path) -> None:
    folder = write(Path("encoder"), small_lm, template="chat", max_query_tokens=64, compression_tokens=10)
    texts = ["Why is the sky blue?", "", "How do I bake bread? " * 40, "1 + 1"]
    expected = read_encoder(folder).encode(texts)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(load(folder).encode(texts) / scale, expected / scale, atol=1e-5)


# --- without this project -------------------------------------------------------------------------------------------

ALONE = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pipeline":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
print(json.dumps(model.encode(json.loads(sys.argv[2]), prompt_name="query").tolist()))
assert "pipeline" not in sys.modules
try:
    import pipeline
except ModuleNotFoundError:
    sys.exit(0)
sys.exit("the project can be imported here")
"""


@pytest.mark.slow
def test_a_machine_without_this_project(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    folder = write(Path("models/encoder"), tiny_backbone("qwen3"), template="chat").resolve()
    elsewhere = workspace / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(folder), json.dumps(TEXTS)],
        cwd=elsewhere,
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(elsewhere), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    query = load_instructions().types["Retrieval"].query
    expected = read_encoder(folder).encode(TEXTS, instruction=query)
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected, atol=1e-5)


def test_the_module_file_is_copied_byte_for_byte_and_needs_four_packages(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"))
    source = (folder / "st_module.py").read_bytes()
    assert source == module_file().read_bytes()
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert others == {"torch", "transformers", "safetensors", "sentence_transformers", "peft"}


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_saved_model_is_the_same_folder(
    workspace: Path, tiny_backbone: Callable[..., Path], lora: LoraParams | None
) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"), template="chat", lora=lora)
    model = load(folder)
    model.save_pretrained("saved")
    kept = ["encoder_config.json", "student.safetensors", "st_module.py", "README.md", "tokenizer.json"]
    kept += ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"] if lora else []
    for name in kept:
        assert Path("saved", name).read_bytes() == (folder / name).read_bytes(), name
    expected = model.encode(TEXTS, prompt_name="query")
    np.testing.assert_array_equal(load(Path("saved")).encode(TEXTS, prompt_name="query"), expected)
    np.testing.assert_allclose(read_encoder(Path("saved")).encode(TEXTS), model.encode(TEXTS), atol=1e-5)


def test_a_saved_model_has_the_way_back_to_the_teachers_space(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    transform = TargetTransform("center", False, *[np.ones(6, np.float32)] * 3)
    folder = write(Path("behind"), tiny_backbone("llama"), transform=transform)
    model = load(folder)
    content = (folder / "transform.safetensors").read_bytes()
    (folder / "transform.safetensors").unlink()
    model.save_pretrained("saved")
    assert Path("saved/transform.safetensors").read_bytes() == content
    load(Path("saved")).save_pretrained("again")
    encoder = read_encoder(Path("again"))
    np.testing.assert_allclose(encoder.encode(TEXTS, space="teacher"), model.encode(TEXTS) + 1, atol=1e-5)
    load(write(Path("plain"), tiny_backbone("llama"))).save_pretrained("without")
    assert not Path("without/transform.safetensors").exists()


# --- the backbone ---------------------------------------------------------------------------------------------------


def test_another_backbone_is_refused_unless_asked_for(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"))
    other = str(tiny_backbone("qwen3"))
    with pytest.raises(ValueError, match=r"encoder was trained on .*allow_other_backbone"):
        load(folder, backbone=other)
    taken = load(folder, backbone=other, allow_other_backbone=True)
    assert np.abs(taken.encode(["a"]) - load(folder).encode(["a"])).max() > 1e-3


def test_a_backbone_that_moved(
    workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Path(shutil.copytree(tiny_backbone("llama"), "llm"))
    folder = write(Path("encoder"), here)
    expected = load(folder).encode(TEXTS)
    here.rename("moved")
    with pytest.raises(OSError, match=r"the backbone is the folder llm, which is not here: .*LLM2VEC_GEN_BACKBONE"):
        load(folder)
    np.testing.assert_array_equal(load(folder, backbone="moved").encode(TEXTS), expected)
    monkeypatch.setenv("LLM2VEC_GEN_BACKBONE", str(Path("moved").resolve()))
    np.testing.assert_array_equal(load(folder).encode(TEXTS), expected)


def test_a_backbone_of_the_hub_may_be_a_folder(
    workspace: Path, tiny_backbone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    commit = "c" * 40
    recorded = {"name": "org/llm", "revision": commit}
    folder = write(Path("encoder"), tiny_backbone("llama"), recorded=recorded)
    assert load(folder, backbone=str(tiny_backbone("llama"))).encode(["a"]).shape == (1, 6)
    assert f"nothing here tells whether it is org/llm at revision {commit}" in caplog.text
    caplog.clear()
    snapshots = Path("snapshots")
    shutil.copytree(tiny_backbone("llama"), snapshots / commit)
    shutil.copytree(tiny_backbone("llama"), snapshots / ("d" * 40))
    assert load(folder, backbone=str(snapshots / commit)).encode(["a"]).shape == (1, 6)
    assert "nothing here tells" not in caplog.text
    for other in (str(snapshots / ("d" * 40)), "org/other"):
        with pytest.raises(ValueError, match=r"the encoder was trained on org/llm"):
            load(folder, backbone=other)
    with pytest.raises(OSError, match=rf"cannot load the backbone org/llm at revision {commit}"):
        load(folder)
    unpinned = write(Path("unpinned"), tiny_backbone("llama"), recorded={"name": "org/llm", "revision": "main"})
    assert load(unpinned, backbone=str(snapshots / commit)).encode(["a"]).shape == (1, 6)


def test_code_of_a_backbone_does_not_run_because_the_module_may(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    own = Path(shutil.copytree(tiny_backbone("llama"), "own"))
    (own / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    content = json.loads((own / "config.json").read_text())
    code = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    (own / "config.json").write_text(json.dumps({**content, "model_type": "own", "auto_map": code}))
    folder = write(Path("encoder"), tiny_backbone("llama"), recorded=identify(str(own), None))
    with pytest.raises(OSError, match="contains custom code"):
        load(folder)
    assert type(load(folder, trust_remote_code=True)[0].backbone).__name__ == "OwnModel"


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(workspace: Path, tiny_backbone: Callable[..., Path]) -> Any:
    return load(write(Path("encoder"), tiny_backbone("llama"), template="chat", max_query_tokens=16))


def test_a_long_text_loses_its_end_is_counted_and_keeps_the_new_tokens(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kept = 16 - 3  # the template takes three
    np.testing.assert_allclose(model.encode(["x" * 500]), model.encode(["x" * kept]), atol=1e-6)
    assert model[0].truncated == 1
    model.encode(["y" * 5000, "z" * 14, "z" * 13])
    assert model[0].truncated == 3
    assert caplog.text.count("lose their end") == 1
    model.max_seq_length = 20
    np.testing.assert_allclose(model.encode(["x" * 500]), model.encode(["x" * 17]), atol=1e-6)
    model.max_seq_length = 3
    with pytest.raises(ValueError, match="max_seq_length is 3, the chat template takes 3 by itself"):
        model.encode(["x"])


@pytest.mark.parametrize(("template", "keep"), [("raw", "start"), ("raw", "end"), ("chat", "end")])
def test_the_side_of_a_long_text_that_is_kept_is_ours(
    workspace: Path,
    tiny_backbone: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    template: Template,
    keep: Keep,
) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"), template=template, max_query_tokens=24, keep=keep)
    encoder, model = read_encoder(folder), load(folder)
    texts = ["the beginning of it, much more of it, and its end", "short", "", "ü" * 900]
    np.testing.assert_allclose(model.encode(texts), encoder.encode(texts), atol=1e-5)
    assert f"lose their {'end' if keep == 'start' else 'start'}" in caplog.text
    said = model.encode(texts, prompt="Say: ")
    np.testing.assert_allclose(said, encoder.encode(texts, instruction="Say:"), atol=1e-5)
    assert np.abs(said - model.encode(texts))[:3].max(axis=1).min() > 1e-4
    assert model[0].truncated == 6
    model.save_pretrained("saved")
    np.testing.assert_allclose(load(Path("saved")).encode(texts), encoder.encode(texts), atol=1e-5)
    if keep == "end":
        with pytest.raises(ValueError, match="takes .* tokens, template included, max_seq_length is 24"):
            model.encode(texts, prompt="p" * 30)


def test_a_folder_of_before_sides_keeps_the_start(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"), max_query_tokens=24)
    expected = load(folder).encode(["x" * 10 + "y" * 90])
    content = json.loads((folder / "encoder_config.json").read_text())
    del content["keep"]
    (folder / "encoder_config.json").write_text(json.dumps(content))
    np.testing.assert_array_equal(load(folder).encode(["x" * 10 + "y" * 90]), expected)
    np.testing.assert_allclose(read_encoder(folder).encode(["x" * 10 + "y" * 90]), expected, atol=1e-5)


def test_nothing_and_what_is_no_text(model: Any) -> None:
    assert len(model.encode([])) == 0
    assert np.isfinite(model.encode([""])).all()
    with pytest.raises(ValueError, match="embeds texts, got a tuple"):
        model.encode([("a", "b")])


def test_folders_that_are_damaged(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"), template="chat")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        from sentence_transformers import SentenceTransformer

        SentenceTransformer(str(folder))

    def fails(message: str, **changes: Any) -> None:
        broken = Path(shutil.copytree(folder, "broken"))
        content = {**json.loads((folder / "encoder_config.json").read_text()), **changes}
        kept = {key: value for key, value in content.items() if value is not None}
        (broken / "encoder_config.json").write_text(json.dumps(kept))
        with pytest.raises(ValueError, match=message):
            load(broken)
        shutil.rmtree(broken)

    fails("encoder_config.json lacks template, width", template=None, width=None)
    fails(r"alignment.bias has shape \[6\], encoder_config.json says \[7\]", width=7)
    fails("template is 'own', known are raw, chat and echo", template="own")
    fails("keep is 'middle', known are start and end", keep="middle")
    fails("max_seq_length is 2, the chat template takes 3 by itself", max_query_tokens=2)
    (folder / "encoder_config.json").unlink()
    with pytest.raises(ValueError, match="is not an LLM2Vec-Gen encoder: it has no encoder_config.json"):
        load(folder)


# --- mteb -----------------------------------------------------------------------------------------------------------


def test_prompts_are_the_instructions_that_our_evaluation_gives() -> None:
    from mteb.models.abs_encoder import get_prompt_name
    from mteb.types import PromptType

    instructions = load_instructions()
    prompts = st_prompts(instructions)
    tasks = [(name, "Retrieval") for name in instructions.tasks] + [("Other", name) for name in instructions.types]
    for task, kind in tasks:
        for side in (None, PromptType.query, PromptType.document):
            name = get_prompt_name(prompts, SimpleNamespace(name=task, type=kind), side)  # type: ignore[arg-type]
            chosen = instructions.choose(task, kind, "document" if side == PromptType.document else "query")
            assert prompts[str(name)] == f"{chosen} "


@pytest.mark.filterwarnings("ignore:The fill_missing parameter:DeprecationWarning")  # mteb's own calls
@pytest.mark.filterwarnings("ignore:The `get_sentence_embedding_dimension` method:FutureWarning")
def test_mteb_scores_the_folder_as_our_evaluation_does(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    import mteb

    from pipeline.evaluate.mteb_adapter import MtebEncoder
    from pipeline.evaluate.system import InstructedSystem
    from pipeline.tasks.suites import find_tasks

    folder = write(Path("encoder"), tiny_backbone("llama"), max_query_tokens=128)
    encoder = read_encoder(folder)
    ours = MtebEncoder(
        InstructedSystem(name="student", identity=encoder.identity, encoder=encoder),
        load_instructions(),
        dtype="float32",
    )
    found = []
    for model in (ours, load(folder)):
        tasks = find_tasks([retrieval_folder(Path("find")), sts_folder(Path("pairs"))])
        results = mteb.evaluate(model, tasks, cache=None, show_progress_bar=False)
        found.append([result.get_score() for result in results.task_results])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert 0 < found[0][0] < 1


# --- the model card -------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_trained_on_what(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    from ruamel.yaml import YAML

    params = {"train": {"seed": 3, "token_start": {"kind": "words", "words": "<|a|>"}, "lora": None}}
    recorded = {"name": "org/llm", "revision": "c" * 40}
    folder = write(
        Path("encoder"), tiny_backbone("llama"), recorded=recorded, sources={"tulu": 12000, "mine": 5}, params=params
    )
    card = (folder / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    facts = YAML(typ="safe").load(head)
    assert facts["library_name"] == "sentence-transformers"
    assert facts["base_model"] == "org/llm"
    for line in (
        f"| backbone | name `org/llm`, revision `{'c' * 40}` |",
        "| training rows | 7 queries, answered by the backbone itself |",
        "| training queries from tulu | 12,000 |",
        "| new tokens | 3 compression tokens, 2 thought tokens before them |",
        "| `train.seed` | `3` |",
        '| `train.token_start.words` | `"<\\|a\\|>"` |',
        "| `train.lora` | `null` |",
        NO_RESULTS,
    ):
        assert line in body
    parameters = 5 * 32 + 32 * 32 + 32 + 32 * 6 + 6
    assert f"the {parameters:,} trained parameters: 5 new tokens" in body


def test_the_card_of_a_local_backbone_with_adapters(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"), lora=LORA)
    card = (folder / "README.md").read_text()
    assert "base_model" not in card
    assert "sentence-transformers; its adapters need peft." in card
    assert "LoRA adapters of rank 2" in card
    assert f"looked for in the folder `{tiny_backbone('llama')}`" in card


def test_the_examples_of_the_card_run(
    workspace: Path, tiny_backbone: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"), max_query_tokens=96)
    examples = [part.split("```")[0] for part in (folder / "README.md").read_text().split("```python\n")[1:]]
    assert len(examples) == 2
    exec("\n".join(examples).replace('"DIR"', '"encoder"'), {})
    assert "tensor([[" in capsys.readouterr().out


# --- publishing -----------------------------------------------------------------------------------------------------


def evaluation(name: str, encoder: Path, score: float, kind: str = "evaluate") -> None:
    """A record of a suite or a probe, and its artifact."""
    folder = Path("results") / kind
    with create(folder / name, kind="evaluation", params={}, inputs=[open_artifact(encoder, "encoder")]):
        pass
    metric = "mean/all" if kind == "evaluate" else "accuracy@1"
    metrics = {f"student/{metric}": score, f"teacher/{metric}": 0.5, f"hyde/{metric}": 0.4}
    stored = {"stored": "int8", "dimensions": 6, "bytes_per_million": 6_000_000, "deltas": []}
    record: dict[str, Any] = {"metrics": metrics, "systems": {name: {} for name in ("student", "teacher", "hyde")}}
    if kind == "evaluate":
        record["stored"] = [{**stored, "scores": {metric: score - 0.1}}]
    (folder / f"{name}.json").write_text(json.dumps(record))


def test_a_published_folder_shows_the_scores_of_this_encoder_only(
    workspace: Path, tiny_backbone: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(Path("encoder"), tiny_backbone("llama"))
    other = write(Path("other"), tiny_backbone("llama"), compression_tokens=1)
    evaluation("mteb-lite", folder, 0.61239)
    evaluation("stale", other, 0.99)
    evaluation("safety", folder, 0.3, "probe")
    assert publish(folder, Path("out/mine"), Path("results")) == ["mteb-lite", "safety"]
    card = Path("out/mine/README.md").read_text()
    assert "### mteb-lite\n\n| | student | teacher |\n|---|---|---|\n| mean/all | 0.6124 | 0.5 |" in card
    assert "| accuracy@1 ↓ | 0.3 | 0.5 |" in card
    assert "| stored as | dimensions | bytes of a million | mean/all |\n|---|---|---|---|" in card
    assert "| int8 | 6 | 6,000,000 | 0.5124 |" in card
    assert NO_RESULTS not in card and "0.99" not in card
    assert 'SentenceTransformer("mine"' in card
    assert "results/evaluate/stale.json is no evaluation of encoder as it is now" in caplog.text
    assert not (Path("out/mine") / "manifest.json").exists()
    np.testing.assert_array_equal(load(Path("out/mine")).encode(TEXTS), load(folder).encode(TEXTS))
    assert [path.name for path in Path("out").iterdir()] == ["mine"]
    with pytest.raises(ArtifactError, match="exists already"):
        publish(folder, Path("out/mine"))
    with pytest.raises(ArtifactError, match="results: result is no folder"):
        publish(folder, Path("out/bare"), Path("result"))
    assert not Path("out/bare").exists()
    Path("empty").mkdir()
    assert publish(folder, Path("out/unscored"), Path("empty")) == []
    assert "empty holds no evaluation of encoder: the card shows no scores" in caplog.text
    assert publish(folder, Path("out/bare")) == []
    assert NO_RESULTS in Path("out/bare/README.md").read_text()


@pytest.mark.parametrize(
    ("template", "kwargs"),
    [
        ("{% for part in messages[0]['content'] %}<|user|>{{ part['text'] }}{% endfor %}<|end|>", {}),
        ("{{ strftime_now('%d %b') }}{{ messages[0]['content'] }}<|end|>", {"strftime_now": "2024-07-26"}),
    ],
)
def test_templates_of_parts_and_of_a_date_read_as_ours(
    workspace: Path, tiny_backbone: Callable[..., Path], template: str, kwargs: dict[str, Any]
) -> None:
    backbone = Path(shutil.copytree(tiny_backbone("llama"), "own"))
    (backbone / "chat_template.jinja").write_text(template)
    folder = write(Path("encoder"), backbone, template="chat", chat_template_kwargs=kwargs)
    np.testing.assert_allclose(load(folder).encode(TEXTS), read_encoder(folder).encode(TEXTS), atol=1e-5)
