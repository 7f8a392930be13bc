"""Checkpoints of the paper's authors, both ways, against numbers of their package and against the package itself."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from typer.testing import CliRunner

from pipeline.__main__ import app
from pipeline.backbone.loading import BackboneParams, Keep, Template, identify, load_backbone, load_tokenizer
from pipeline.backbone.lora import LoraParams
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.artifacts import create, open_artifact
from pipeline.core.errors import ArtifactError, BackboneError, ParamsError, TrainingError
from pipeline.core.readers import open_texts
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.encoder.folder.read import read_config, read_encoder
from pipeline.encoder.folder.rotate import rotate
from pipeline.encoder.folder.write import write_encoder
from pipeline.encoder.student import new_student
from pipeline.export.official.export import export_official
from pipeline.export.official.files import RunConfig
from pipeline.export.official.import_ import import_official
from pipeline.export.official.reading import read_checkpoint
from tests.conftest import ROOT, tiny_tokenizer
from tests.export.encoder_folders import write_folder
from tests.export.official_folders import TOKENS, WIDTH, numbers, save_projection, write_backbone, write_checkpoint

TEXTS = ["Why is the sky blue?", "a", " spaces, and\na line of its own ", "long " * 30]
# `max_length` of their encode at which the last text is cut.
MAX_LENGTH = 64

THEIRS_ROWS = [
    [-0.081491, 0.250273, -0.298368, 0.259562, -0.301403],
    [-0.094475, 0.236935, -0.309226, 0.253491, -0.301397],
    [-0.089015, 0.241684, -0.306195, 0.254159, -0.303234],
    [-0.069650, 0.259199, -0.294252, 0.257992, -0.308326],
]
THEIRS_LORA = [
    [0.010166, 0.320853, -0.263862, 0.250660, -0.351821],
    [-0.070122, 0.246702, -0.316121, 0.231400, -0.333990],
    [0.005361, 0.310225, -0.278056, 0.235918, -0.363979],
    [0.020211, 0.326529, -0.263760, 0.245166, -0.361743],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `backbone`, and checkpoints `rows` and `lora` on it."""
    folder = tmp_path_factory.mktemp("official")
    backbone = write_backbone(folder / "backbone")
    write_checkpoint(folder / "rows", backbone)
    write_checkpoint(folder / "lora", backbone, lora=True)
    return folder


@pytest.fixture
def checkpoint(workspace: Path) -> Path:
    """A checkpoint of its own to break, named `theirs`."""
    return write_checkpoint(workspace / "theirs", write_backbone(workspace / "backbone"))


write_ours = partial(write_folder, max_query_tokens=61)


# --- what theirs becomes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "theirs"), [("rows", THEIRS_ROWS), ("lora", THEIRS_LORA)])
def test_an_imported_checkpoint_embeds_as_in_their_package(
    folders: Path, tmp_path: Path, kind: str, theirs: list[list[float]]
) -> None:
    """The expected numbers are what their package (0.1.3, transformers 4.56.2) gave for the very same folder."""
    notes = import_official(str(folders / kind), tmp_path / "ours", max_length=MAX_LENGTH)
    encoder = read_encoder(tmp_path / "ours")
    np.testing.assert_allclose(encoder.encode(TEXTS), theirs, atol=1e-5)
    assert notes == ["it was trained on inputs of at most 512 tokens and will read 64; --max-length changes this"]


def test_an_imported_folder_says_where_it_came_from(folders: Path, tmp_path: Path) -> None:
    assert import_official(str(folders / "lora"), tmp_path / "ours") == []
    config = read_config(tmp_path / "ours")
    assert config.origin is not None
    assert config.origin["format"] == "llm2vec-gen"
    assert config.origin["name"] == str(folders / "lora")
    assert len(config.origin["sha256"]) == 64
    assert config.backbone == identify(str(folders / "backbone"), None)
    assert config.teacher == {"name": "some/teacher-mntp"}
    assert (config.template, config.max_query_tokens) == ("raw", 512 - 4)
    assert (config.thought_tokens, config.compression_tokens, config.width) == (1, 3, WIDTH)
    assert config.lora == LoraParams(rank=2, alpha=6.0, dropout=0.05, targets=["down_proj", "q_proj"])
    card = (tmp_path / "ours" / "README.md").read_text()
    assert config.origin["sha256"] in card
    assert "{" not in card
    open_artifact(tmp_path / "ours", "encoder")


def test_a_checkpoint_of_the_hub_is_pinned_to_its_commit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef"
    Path("snapshots").mkdir()
    snapshot = Path("theirs").rename(Path("snapshots") / commit)

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("someone/model", "main")
        assert not any("*" in pattern or "args" in pattern for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    import_official("someone/model", Path("ours"), revision="main")
    assert read_config(Path("ours")).origin == {"format": "llm2vec-gen", "name": "someone/model", "revision": commit}


def test_a_backbone_of_the_hub_is_pinned_to_its_commit(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "f" * 40
    home = Path("cache/models--someone--backbone").resolve()
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    Path("backbone").rename(home / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home.parent))
    rewrite(str(Path("backbone").resolve()), "someone/backbone")
    import_official("theirs", Path("ours"))
    assert read_config(Path("ours")).backbone == {"name": "someone/backbone", "revision": commit}


def test_another_place_of_the_backbone(checkpoint: Path) -> None:
    Path("backbone").rename("moved")
    with pytest.raises(BackboneError, match="does not exist|cannot load"):
        import_official("theirs", Path("ours"))
    import_official("theirs", Path("ours"), backbone="moved")
    assert read_encoder(Path("ours")).encode(["a"]).shape == (1, WIDTH)


def test_rows_go_with_their_token_and_not_with_the_order_in_which_they_are_stored(folders: Path) -> None:
    rows = read_checkpoint(folders / "rows").rows
    assert torch.equal(rows, numbers((4, 32), 21))


def test_a_checkpoint_within_a_training_run_has_its_config_above(checkpoint: Path) -> None:
    Path("run").mkdir()
    Path("theirs/run_config.yml").rename("run/run_config.yml")
    Path("theirs").rename("run/checkpoint-100")
    assert read_checkpoint(Path("run/checkpoint-100")).texts == TOKENS


def test_without_projections_the_mean_hidden_state_is_the_embedding(checkpoint: Path) -> None:
    Path("theirs/reconstruction_mlp").unlink()
    Path("theirs/alignment_mlp").unlink()
    import_official("theirs", Path("ours"))
    encoder = read_encoder(Path("ours"))
    np.testing.assert_allclose(encoder.encode(["q"]), encoder.hidden_states(["q"]).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "said", "complete"),
    [("reconstruction_mlp", "True", False), ("alignment_mlp", "true", False), ("alignment_mlp", "False", True)],
)
def test_a_projection_that_the_run_config_names_must_be_there(
    checkpoint: Path, name: str, said: str, complete: bool
) -> None:
    (Path("theirs") / name).unlink()
    file = Path("theirs/run_config.yml")
    file.write_text(file.read_text() + f"add_{name}: {said}\n")
    if complete:
        assert getattr(read_checkpoint(Path("theirs")), name.removesuffix("_mlp")) is None
        return
    with pytest.raises(ArtifactError, match=rf"theirs/{name} is missing, .* says add_{name}"):
        import_official("theirs", Path("ours"))
    assert not Path("ours").exists()


def test_a_trained_decoder_is_named(checkpoint: Path) -> None:
    Path("theirs/encoder_decoder_config.json").write_text('{"encoding_mode": "last_3_tokens", "save_decoder": true}')
    [note] = import_official("theirs", Path("ours"))
    assert "its decoder was trained too" in note


def test_a_tokenizer_that_pads_where_their_package_reads_is_named(checkpoint: Path) -> None:
    edit("tokenizer_config.json", padding_side="right")
    [note] = import_official("theirs", Path("ours"))
    assert note.startswith("its tokenizer pads on the right")


# --- safely ---------------------------------------------------------------------------------------------------------


class Harm:
    """Its pickle creates the file `harmed` when something reads it without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("name", "inside"),
    [("reconstruction_mlp", True), ("alignment_mlp", False), ("encoder/adapter_model.bin", True)],
)
def test_a_pickle_that_runs_something_is_refused(checkpoint: Path, name: str, inside: bool) -> None:
    Path("theirs/encoder/adapter_model.safetensors").unlink() if name.endswith(".bin") else None
    torch.save({"config": {}, "state_dict": Harm()} if inside else Harm(), Path("theirs") / name)
    with pytest.raises(
        ArtifactError, match=rf"theirs/{name} is refused: it asks for posix.system; .*none of which was run"
    ):
        import_official("theirs", Path("ours"))
    assert not Path("harmed").exists()
    assert not Path("ours").exists()
    torch.load(Path("theirs") / name, weights_only=False)
    assert Path("harmed").exists()  # it would have


def test_a_tag_of_the_run_config_makes_no_object(checkpoint: Path) -> None:
    file = Path("theirs/run_config.yml")
    file.write_text(file.read_text() + "optim: !!python/object/apply:os.system ['touch harmed']\n")
    assert RunConfig(Path("theirs")).text("model_name_or_path") == str(Path("backbone").resolve())
    assert not Path("harmed").exists()


# --- what is refused ------------------------------------------------------------------------------------------------


def edit(path: str, **changes: Any) -> None:
    """Change keys of a JSON file of the checkpoint."""
    file = Path("theirs") / path
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(old: str, new: str) -> None:
    file = Path("theirs/run_config.yml")
    file.write_text(file.read_text().replace(old, new))


BREAKS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Path("theirs/run_config.yml").unlink(), ArtifactError, "no checkpoint of the authors' package"),
    (lambda: Path("theirs/run_config.yml").write_text("a: [b"), ArtifactError, "run_config.yml is not YAML"),
    (lambda: Path("theirs/run_config.yml").write_text("- a"), ArtifactError, "is not a mapping"),
    (lambda: Path("theirs/run_config.yml").write_text("a: b"), ArtifactError, "special_tokens is missing"),
    (lambda: rewrite("'<question4>'", "'<other>'"), ArtifactError, "<other> as the new tokens, its tokenizer appends"),
    (lambda: Path("theirs/encoder/adapter_config.json").unlink(), ArtifactError, "adapter_config.json is missing"),
    (lambda: Path("theirs/encoder/adapter_config.json").write_text("["), ArtifactError, "cannot be read"),
    (lambda: Path("theirs/encoder/adapter_model.safetensors").unlink(), ArtifactError, "safetensors is missing"),
    (lambda: Path("theirs/encoder/adapter_model.safetensors").write_bytes(b"x"), ArtifactError, "cannot be read"),
    (lambda: Path("theirs/tokenizer.json").unlink(), ArtifactError, "tokenizer.json is missing"),
    (lambda: Path("theirs/alignment_mlp").write_bytes(b"x"), ArtifactError, "alignment_mlp is refused: it is damaged"),
    (lambda: torch.save([1], "theirs/alignment_mlp"), ArtifactError, "is not a projection"),
    (lambda: edit("encoder_decoder_config.json", encoding_mode="last_5_tokens"), ArtifactError, "last_1_tokens to"),
    (lambda: edit("encoder_decoder_config.json", encoding_mode="mean"), ArtifactError, "encoding_mode is 'mean'"),
    (lambda: edit("encoder/adapter_config.json", token_indices=[1, 2, 3]), ArtifactError, "lists 3 trained tokens"),
    (lambda: edit("encoder/adapter_config.json", token_indices=[1, 2, 3, 4]), ArtifactError, r"trains the tokens \[1"),
    (lambda: edit("encoder/adapter_config.json", peft_type="IA3"), ArtifactError, "peft_type is IA3, known are"),
    (lambda: edit("encoder/adapter_config.json", peft_type="LORA", use_dora=True), ArtifactError, "use_dora is set"),
    (lambda: edit("encoder/adapter_config.json", peft_type="LORA", r=0, lora_alpha=1), ParamsError, "rank"),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "error", "message"), BREAKS)
def test_what_is_not_theirs_or_not_whole(
    checkpoint: Path, break_it: Callable[[], object], error: type[Exception], message: str
) -> None:
    break_it()
    with pytest.raises(error, match=message):
        import_official("theirs", Path("ours"))
    assert not Path("ours").exists()


@pytest.mark.parametrize(
    ("weight", "bias", "changes", "message"),
    [
        (numbers((5, 32), 0), numbers((5,), 0), {"size": 3}, "size 3 and pooling_mode 'linear'"),
        (numbers((5, 32), 0), numbers((5,), 0), {"pooling_mode": "mean_linear"}, "pooling_mode 'mean_linear'"),
        (numbers((5, 31), 0), numbers((5,), 0), {}, r"shape \[5, 31\].* need \[5, 32\]"),
        (numbers((5, 32), 0) / 0, numbers((5,), 0), {}, "projection.weight holds NaN or infinite"),
    ],
)
def test_projections_of_another_kind(
    checkpoint: Path, weight: torch.Tensor, bias: torch.Tensor, changes: dict[str, Any], message: str
) -> None:
    save_projection(Path("theirs/alignment_mlp"), weight, bias, **changes)
    with pytest.raises(ArtifactError, match=message):
        import_official("theirs", Path("ours"))


def test_another_backbone(checkpoint: Path) -> None:
    write_backbone(Path("narrow"), hidden=24)
    with pytest.raises(BackboneError, match="narrow has hidden size 24, the checkpoint 32"):
        import_official("theirs", Path("ours"), backbone="narrow")
    table = load_backbone(BackboneParams(name="backbone")).get_input_embeddings().weight.detach()
    from safetensors.torch import load_file, save_file

    file = Path("theirs/encoder/adapter_model.safetensors")
    # As the embedding table is saved where it was made to fit the tokenizer: its last rows are the new tokens'.
    save_file({**load_file(file), "base_model.model.embed_tokens.base_layer.weight": table[:259].clone()}, file)
    import_official("theirs", Path("ours"))
    write_backbone(Path("other"), seed=5)
    with pytest.raises(BackboneError, match="other has other input embeddings than the checkpoint"):
        import_official("theirs", Path("ours2"), backbone="other")


def test_another_tokenizer(checkpoint: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_file("theirs/tokenizer.json")
    backend.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 2)])
    backend.save("theirs/tokenizer.json")
    with pytest.raises(ArtifactError, match="it is another backbone's, or it adds more than the new tokens"):
        import_official("theirs", Path("ours"))


def test_places_that_do_not_exist_or_are_taken(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="folder ./gone does not exist"):
        import_official("./gone", Path("ours"))
    with pytest.raises(ArtifactError, match="revision: abc: theirs is a folder"):
        import_official("theirs", Path("ours"), revision="abc")
    with pytest.raises(ArtifactError, match="cannot load 'someone/model' at revision 0123abc: "):
        import_official("someone/model", Path("ours"), revision="0123abc")
    with pytest.raises(ArtifactError, match="max_length: 4: the 4 new tokens of theirs leave no room"):
        import_official("theirs", Path("ours"), max_length=4)
    Path("ours").mkdir()
    Path("ours/mine.txt").write_text("kept")
    with pytest.raises(ArtifactError, match="ours exists already"):
        import_official("theirs", Path("ours"))
    with pytest.raises(ArtifactError, match="ours exists already"):
        export_official(Path("none"), Path("ours"))
    assert Path("ours/mine.txt").read_text() == "kept"


# --- what ours becomes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [None, LoraParams(rank=2, alpha=6.0), LoraParams(rank=3, alpha=1.0, targets=["self_attn.q_proj", "down_proj"])],
)
def test_what_was_exported_and_imported_embeds_as_before(
    folders: Path, workspace: Path, lora: LoraParams | None
) -> None:
    ours = write_ours(Path("ours"), folders / "backbone", lora=lora)
    assert export_official(ours, Path("theirs")) == [
        "their encode cuts inputs to 512 tokens: call it with max_length=66"
    ]
    import_official("theirs", Path("again"), max_length=66)
    first, second = read_encoder(ours), read_encoder(Path("again"))
    np.testing.assert_allclose(second.encode(TEXTS), first.encode(TEXTS), atol=1e-6)
    assert second.config.compression_tokens == 3
    assert second.config.backbone == first.config.backbone


@pytest.mark.parametrize(
    ("form", "width"), [({}, 5 + 32), ({"decorrelated": True}, 5 + 32), ({"form": "added", "mapped": True}, 5)]
)
def test_the_reading_goes_along(folders: Path, workspace: Path, form: dict[str, Any], width: int) -> None:
    ours = write_ours(Path("ours"), folders / "backbone", share=0.3, **form)
    assert any("inverse of the reconstruction projection" in note for note in export_official(ours, Path("theirs")))
    expected = read_encoder(ours).encode(TEXTS)
    np.testing.assert_allclose(by_the_format(Path("theirs"), TEXTS, 66), expected, atol=2e-4)
    import_official("theirs", Path("again"), max_length=66)
    again = read_encoder(Path("again"))
    assert (again.width, again.config.response_share) == (width, 1)
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=2e-4)


def test_a_rotation_goes_along(folders: Path, workspace: Path) -> None:
    ours = write_ours(Path("ours"), folders / "backbone")
    Path("texts.txt").write_text("".join(f"{word} {number}\n" for word in ("a", "b c", "d") for number in range(4)))
    rotate(ours, read_encoder(ours), open_texts(Path("texts.txt")), Path("rotated"))
    assert any("or the rotation" in note for note in export_official(Path("rotated"), Path("theirs")))
    expected = read_encoder(Path("rotated")).encode(TEXTS)
    np.testing.assert_allclose(by_the_format(Path("theirs"), TEXTS, 66), expected, atol=2e-4)


def test_a_reconstruction_without_an_inverse_cannot_carry_the_reading(folders: Path, workspace: Path) -> None:
    from safetensors.torch import load_file, save_file

    ours = write_ours(Path("ours"), folders / "backbone", share=0.3)
    tensors = load_file(ours / "student.safetensors")
    tensors["reconstruction.weight"][3] = tensors["reconstruction.weight"][4]
    save_file(tensors, ours / "student.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"response_share is 0\.3.*--response-share 1"):
        export_official(ours, Path("theirs"))
    assert not Path("theirs").exists()


def by_the_format(folder: Path, texts: list[str], max_length: int) -> np.ndarray:
    """What the description of their format says that a checkpoint embeds, read without any code of ours."""
    from ruamel.yaml import YAML
    from safetensors.torch import load_file
    from transformers import LlamaModel

    # Of a key that is there twice the last value counts.
    lines = [line.split(": ", 1) for line in (folder / "run_config.yml").read_text().splitlines() if ": " in line]
    run = {key: YAML(typ="safe").load(value) for key, value in lines}
    adapter = json.loads((folder / "encoder/adapter_config.json").read_text())
    tensors = load_file(folder / "encoder/adapter_model.safetensors")
    tokenizer, new = Tokenizer.from_file(str(folder / "tokenizer.json")), run["special_tokens"]
    backbone = LlamaModel.from_pretrained(run["model_name_or_path"], dtype=torch.float32)
    ids = adapter.get("token_indices") or adapter["trainable_token_indices"]["embed_tokens"]
    [rows] = [tensor for name, tensor in tensors.items() if name.endswith("trainable_tokens_delta")]
    row_of = dict(zip(ids, rows, strict=True))
    read = int(json.loads((folder / "encoder_decoder_config.json").read_text())["encoding_mode"].split("_")[1])
    projections = [torch.load(folder / f"{name}_mlp", weights_only=True) for name in ("reconstruction", "alignment")]
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
            update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * adapter["lora_alpha"] / adapter["r"]
            place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            backbone.get_submodule(place).weight += update
        found = []
        for text in texts:
            tokens = tokenizer.encode(text).ids[: max_length - len(new)] + [tokenizer.token_to_id(name) for name in new]
            table = backbone.embed_tokens.weight
            embeds = torch.stack([row_of[token] if token in row_of else table[token] for token in tokens])
            hidden = backbone(inputs_embeds=embeds[None]).last_hidden_state[0, -read:]
            for layer in (projection["state_dict"] for projection in projections):
                hidden = hidden @ layer["projection.weight"].T + layer["projection.bias"]
            found.append(hidden.mean(dim=0).numpy())
    return np.stack(found)


@pytest.mark.parametrize(("kind", "theirs"), [("rows", THEIRS_ROWS), ("lora", THEIRS_LORA)])
def test_an_exported_checkpoint_embeds_as_in_their_package(
    folders: Path, workspace: Path, kind: str, theirs: list[list[float]]
) -> None:
    """Against the numbers that their package gave for the checkpoint that it is made from, without our import."""
    np.testing.assert_allclose(by_the_format(folders / kind, TEXTS, MAX_LENGTH), theirs, atol=1e-5)
    import_official(str(folders / kind), Path("ours"), max_length=MAX_LENGTH)
    export_official(Path("ours"), Path("theirs"))
    np.testing.assert_allclose(by_the_format(Path("theirs"), TEXTS, MAX_LENGTH), theirs, atol=1e-5)
    model = json.loads(Path("theirs/encoder_decoder_config.json").read_text())
    assert model == {"encoding_mode": "last_3_tokens", "save_decoder": False}
    tokenizer = json.loads(Path("theirs/tokenizer_config.json").read_text())
    assert (tokenizer["additional_special_tokens"], tokenizer["padding_side"]) == (TOKENS, "left")


def test_the_dtype_is_that_of_everything(folders: Path, workspace: Path) -> None:
    ours = write_ours(Path("ours"), folders / "backbone")
    export_official(ours, Path("theirs"), dtype="bfloat16")
    read = read_checkpoint(Path("theirs"))
    assert read.alignment is not None and read.reconstruction is not None
    assert {read.rows.dtype, read.alignment.weight.dtype, read.reconstruction.bias.dtype} == {torch.bfloat16}
    assert torch.load("theirs/alignment_mlp", weights_only=True)["config"]["dtype"] == "torch.bfloat16"
    assert RunConfig(Path("theirs")).text("torch_dtype") == "bfloat16"


def test_a_backbone_that_version_4_would_misread_is_copied_with_the_base_of_its_rotation(
    folders: Path, workspace: Path
) -> None:
    file = write_backbone(Path("backbone")) / "config.json"
    content = json.loads(file.read_text())
    del content["rope_theta"]
    file.write_text(json.dumps(content))
    notes = export_official(write_ours(Path("ours"), Path("backbone")), Path("theirs"))
    copied = Path("theirs/backbone").resolve()
    assert f"the backbone was copied to {copied}, its config written for transformers 4: keep it there" in notes
    assert json.loads((copied / "config.json").read_text())["rope_theta"] == 500.0
    assert (copied / "model.safetensors").read_bytes() == Path("backbone/model.safetensors").read_bytes()
    assert RunConfig(Path("theirs")).text("model_name_or_path") == str(copied)
    assert json.loads(Path("theirs/encoder/config.json").read_text())["rope_theta"] == 500.0


def test_a_chat_template_is_written_into_the_tokenizer(folders: Path, workspace: Path) -> None:
    ours = write_ours(Path("ours"), folders / "backbone", template="chat")
    _, framed = export_official(ours, Path("theirs"))
    assert framed.startswith("the tokenizer adds the template and the new tokens itself")
    backend = Tokenizer.from_file("theirs/tokenizer.json")
    [prompt] = PromptFormatter(tiny_tokenizer(), "chat", 61).batch(["Why?"])
    assert backend.encode("Why?").ids == [*prompt.token_ids, 259, 260, 261, 262, 263]
    assert json.loads(Path("theirs/tokenizer_config.json").read_text())["additional_special_tokens"] == []
    with pytest.raises(ArtifactError, match="names no new tokens .* export-official writes .* with a chat template"):
        import_official("theirs", Path("again"))


def test_the_side_that_their_package_cannot_keep_is_said(folders: Path, workspace: Path) -> None:
    sides: list[Keep] = ["start", "end"]
    for keep in sides:
        notes = export_official(write_ours(Path(keep), folders / "backbone", keep=keep), Path(f"theirs-{keep}"))
        said = "this encoder keeps the end of a text of more than 61 tokens" in " ".join(notes)
        assert said == (keep == "end")


def test_what_their_package_cannot_have_is_said(folders: Path, workspace: Path) -> None:
    with pytest.raises(TrainingError, match="none is not an encoder"):
        export_official(Path("none"), Path("theirs"))
    ours = write_ours(Path("ours"), folders / "backbone")
    write_backbone(Path("other"), seed=5)
    with pytest.raises(TrainingError, match=r"other has sha256 .*, the encoder was trained on"):
        export_official(ours, Path("theirs"), backbone="other")
    config = json.loads(Path("ours/encoder_config.json").read_text())
    Path("ours/encoder_config.json").write_text(json.dumps(config | {"backbone": {"name": "x", "revision": "0123"}}))
    write_backbone(Path("narrow"), hidden=24)
    with pytest.raises(BackboneError, match="narrow has hidden size 24, the encoder was trained on 32"):
        export_official(ours, Path("theirs"), backbone="narrow")
    with pytest.raises(BackboneError, match="cannot read the config of backbone 'x'"):
        export_official(ours, Path("theirs"))
    assert not Path("theirs").exists()


def test_a_backbone_that_scales_its_input_embeddings(workspace: Path, tiny_backbone: Callable[..., Path]) -> None:
    ours = write_ours(Path("ours"), tiny_backbone("gemma3"))
    with pytest.raises(TrainingError, match="scales its rows, which their format cannot express"):
        export_official(ours, Path("theirs"))


def test_the_commands(folders: Path, workspace: Path) -> None:
    def call(*arguments: object) -> tuple[int, str]:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stderr if result.exit_code else result.stdout

    assert call("import-official", folders / "rows", "ours") == (0, f"{folders / 'rows'} -> ours\n")
    assert call("export-official", "ours", "theirs") == (0, "ours -> theirs\n")
    assert call("import-official", "gone", "x") == (1, "error: folder gone does not exist\n")
    assert call("export-official", "ours", "x", "--dtype", "half")[1].startswith("error: --dtype: unknown value 'half'")
    first = read_checkpoint(folders / "rows")
    second = read_checkpoint(Path("theirs"))
    assert torch.equal(first.rows, second.rows)
    assert (first.ids, first.compression_tokens, first.texts) == (second.ids, second.compression_tokens, second.texts)
    assert first.alignment is not None and second.alignment is not None
    assert torch.equal(first.alignment.weight, second.alignment.weight)


# --- their package itself -------------------------------------------------------------------------------------------

PEER = ROOT / ".bench" / "reference-env" / "bin" / "python"


def peer(*arguments: object, texts: list[str] | None = None) -> str:
    """What `official_peer.py` prints in the environment of their package."""
    if not PEER.is_file():
        pytest.skip("the authors' package is not here: python -m bench.encode makes .bench/reference-env")
    done = subprocess.run(
        [PEER, ROOT / "tests" / "export" / "official_peer.py", *map(str, arguments)],
        input=json.dumps(texts), capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def their_embeddings(folder: Path, max_length: int = MAX_LENGTH) -> np.ndarray:
    return np.array(json.loads(peer("encode", folder.resolve(), max_length, texts=TEXTS).splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["token-rows", "lora"])
def test_a_checkpoint_that_their_package_wrote(folders: Path, workspace: Path, kind: str) -> None:
    peer("write", folders / "backbone", workspace / "theirs", kind)
    import_official("theirs", Path("ours"), max_length=MAX_LENGTH)
    encoder = read_encoder(Path("ours"))
    assert (encoder.config.lora is not None) == (kind == "lora")
    np.testing.assert_allclose(encoder.encode(TEXTS), their_embeddings(Path("theirs")), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "lora"])
def test_the_stored_expectation_is_what_their_package_gives(folders: Path, kind: str) -> None:
    expected = THEIRS_ROWS if kind == "rows" else THEIRS_LORA
    np.testing.assert_allclose(their_embeddings(folders / kind), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("template", "lora"), [("raw", None), ("raw", LoraParams(rank=2, alpha=6.0)), ("chat", None)])
def test_their_package_embeds_what_was_exported_as_we_do(
    folders: Path, workspace: Path, template: Template, lora: LoraParams | None
) -> None:
    ours = write_ours(Path("ours"), folders / "backbone", template=template, lora=lora)
    export_official(ours, Path("theirs"))
    found = their_embeddings(Path("theirs"), 61 + 5)
    np.testing.assert_allclose(found, read_encoder(ours).encode(TEXTS), atol=1e-5)


@pytest.mark.slow
def test_their_package_reads_a_backbone_that_was_copied_for_it(
    workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    """Of the other architecture that the authors train, as version 5 of transformers saves it."""
    ours = write_ours(Path("ours"), tiny_backbone("qwen3"))
    export_official(ours, Path("theirs"))
    assert Path("theirs/backbone").is_dir()
    found = their_embeddings(Path("theirs"), 61 + 5)
    np.testing.assert_allclose(found, read_encoder(ours).encode(TEXTS), atol=1e-5)


@pytest.mark.slow
@pytest.mark.models
def test_a_real_model_exported_embeds_as_we_do_in_their_package(small_lm: Path, workspace: Path) -> None:
    """A local folder that version 5 of transformers wrote, its tokenizer too."""
    params = BackboneParams(name=str(small_lm), dtype="float32")
    model = load_backbone(params)
    student = new_student(model, 8, compression_tokens=10, thought_tokens=0, seed=0)
    config = EncoderConfig(
        backbone=identify(str(small_lm), None), chat_template_kwargs={}, template="chat", max_query_tokens=60,
        compression_tokens=10, thought_tokens=0, hidden=576, width=8, teacher={"name": "t"},
    )  # fmt: skip
    with create(Path("ours"), kind="encoder", params={}) as writer:
        write_encoder(writer, student, load_tokenizer(params), config, rows=1, steps=1)
    export_official(Path("ours"), Path("theirs"))
    texts = [*(text.strip() for text in TEXTS), "a sentence, of some length; " * 30]
    found = json.loads(peer("encode", Path("theirs").resolve(), 70, texts=texts).splitlines()[-1])
    expected = read_encoder(Path("ours")).encode(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))
