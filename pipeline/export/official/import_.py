"""A checkpoint of the authors as an encoder of ours: `python -m pipeline import-official DIR OUT [--backbone PATH]`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_tokenizer
from pipeline.core.artifacts import check_new, create
from pipeline.core.errors import ArtifactError, BackboneError
from pipeline.core.text import templates
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.export.official import files
from pipeline.export.official.files import fetch
from pipeline.export.official.reading import Linear, OfficialCheckpoint, read_checkpoint
from pipeline.export.official.tokenizer import check_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.encoder.student import Student

# Relative change of the backbone's embedding table that rounding to another half precision may cause.
_SAME_TABLE = 0.01
_COMPARED_ROWS = 2_000


def import_official(
    source: str, out: Path, *, backbone: str | None = None, revision: str | None = None, max_length: int | None = None
) -> list[str]:
    """Write an encoder folder that embeds as a checkpoint does in their package; returns notes for the user.

    Args:
        source: a folder, or a name on the hub with its `revision`.
        backbone: folder or name, in place of the one that the checkpoint names.
        max_length: longest input in tokens, new tokens included; None: 512, as in their `encode`.

    Raises:
        ArtifactError: `out` exists, or the checkpoint is of another format, damaged, unsafe, or beyond our format.
        BackboneError: the backbone cannot be loaded, or is not the checkpoint's.
        TrainingError: the adapters do not fit the backbone.
    """
    from pipeline.encoder.folder.write import write_encoder

    check_new(out)
    folder, origin = fetch(source, revision)
    checkpoint = read_checkpoint(folder)
    params = BackboneParams(name=backbone or checkpoint.backbone)
    if not params.name:
        message = f"the {files.RUN_CONFIG} of {source} names none (model_name_or_path): give it"
        raise ArtifactError(message, argument="backbone")
    student = _student(checkpoint, source)
    length = max_length or files.MAX_LENGTH
    if length <= (new := len(checkpoint.texts)):
        message = f"{length}: the {new} new tokens of {source} leave no room for a text"
        raise ArtifactError(message, argument="max_length")
    tokenizer = load_tokenizer(params)
    check_tokenizer(folder, "".join(checkpoint.texts), checkpoint.ids, tokenizer)
    model = load_backbone(params)
    _check_backbone(checkpoint, model, params.name)
    config = _config(checkpoint, student, _identity(params.name), origin, length)
    adapter = _adapter(checkpoint, model, source)
    models = {"backbone": config.backbone, "teacher": config.teacher}
    with create(out, kind="encoder", params={"origin": origin, "max_length": length}, models=models) as writer:
        write_encoder(writer, student, tokenizer, config, rows=0, steps=0, adapter=adapter)
        card = templates(Path(__file__).parent, autoescape=False).get_template("imported.md.j2").render(config=config)
        (writer.path / "README.md").write_text(card, encoding="utf-8")
    return _notes(checkpoint, length)


def _check_backbone(checkpoint: OfficialCheckpoint, model: Any, name: str) -> None:
    import torch

    embeddings = model.get_input_embeddings()
    if type(embeddings) is not torch.nn.Embedding:
        kind = type(embeddings).__name__
        raise BackboneError(f"{name} scales its input embeddings ({kind}), no row fits", argument="backbone")
    found, expected = embeddings.weight.shape[1], checkpoint.rows.shape[1]
    problem = None
    if found != expected:
        problem = f"hidden size {found}, the checkpoint {expected}"
    elif checkpoint.table is not None and not _same_table(embeddings.weight, checkpoint.table, checkpoint.ids):
        problem = "other input embeddings than the checkpoint"
    if problem:
        message = f"{name} has {problem}, which was trained on {checkpoint.backbone}: give that backbone"
        raise BackboneError(message, argument="backbone")


def _same_table(ours: "Tensor", theirs: "Tensor", new: list[int]) -> bool:
    """Whether two embedding tables agree in the rows that both have, but for those of the new tokens."""
    import torch

    rows = torch.arange(shared := min(len(ours), len(theirs)))[:: max(1, shared // _COMPARED_ROWS)]
    rows = rows[~torch.isin(rows, torch.tensor(new))]
    first, second = ours[rows].float(), theirs[rows].float()
    return bool((first - second).norm() <= _SAME_TABLE * second.norm())


def _identity(name: str) -> dict[str, str]:
    """What pins a backbone that was just loaded; the checkpoint names no commit, so the cached one is recorded."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return identify(name, None)
    cached = try_to_load_from_cache(name, "config.json")
    return identify(name, Path(cached).parent.name if isinstance(cached, str) else None)


def _student(checkpoint: OfficialCheckpoint, source: str) -> "Student":
    from pipeline.encoder.student import Student

    tokens, hidden = checkpoint.rows.shape
    reconstruction = checkpoint.reconstruction or _identity_layer(hidden)
    alignment = checkpoint.alignment or _identity_layer(hidden)
    for name, layer, shape in (
        (files.RECONSTRUCTION, reconstruction, (hidden, hidden)),
        (files.ALIGNMENT, alignment, (len(alignment.bias), hidden)),
    ):
        if tuple(layer.weight.shape) != shape or len(layer.bias) != shape[0]:
            found = f"{source}: {name} has shape {list(layer.weight.shape)}"
            raise ArtifactError(f"{found}, the rows of its new tokens need {list(shape)}")
    width, read = len(alignment.bias), checkpoint.compression_tokens
    student = Student(hidden, width, read, tokens - read)
    tensors = {
        "tokens": checkpoint.rows,
        "reconstruction.weight": reconstruction.weight,
        "reconstruction.bias": reconstruction.bias,
        "alignment.weight": alignment.weight,
        "alignment.bias": alignment.bias,
    }
    student.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return student


def _identity_layer(hidden: int) -> Linear:
    import torch

    return Linear(torch.eye(hidden), torch.zeros(hidden))


def _config(
    checkpoint: OfficialCheckpoint,
    student: "Student",
    backbone: dict[str, str],
    origin: Mapping[str, str],
    max_length: int,
) -> EncoderConfig:
    return EncoderConfig(
        backbone=backbone,
        chat_template_kwargs={},
        template="raw",
        max_query_tokens=max_length - len(checkpoint.texts),
        compression_tokens=student.compression_tokens,
        thought_tokens=student.thought_tokens,
        hidden=student.hidden,
        width=student.width,
        teacher={"name": " + ".join(checkpoint.teacher) or "unknown"},
        lora=checkpoint.lora,
        origin={"format": "llm2vec-gen", **origin},
    )


def _adapter(checkpoint: OfficialCheckpoint, model: Any, source: str) -> "dict[str, Tensor] | None":
    """The adapters under our names; raises TrainingError if one does not fit the backbone."""
    from pipeline.backbone.lora import add_adapter, set_adapter

    if checkpoint.lora is None:
        return None
    # Theirs adapt the transformer without its head, ours the whole model.
    body = f"{files.PREFIX}{model.base_model_prefix}."
    tensors = {body + name.removeprefix(files.PREFIX): tensor.float() for name, tensor in checkpoint.adapter.items()}
    set_adapter(add_adapter(model, **checkpoint.lora.model_dump(), seed=0), tensors, where=f"{source}/{files.ENCODER}")
    return tensors


def _notes(checkpoint: OfficialCheckpoint, max_length: int) -> list[str]:
    notes = {
        f"it was trained on inputs of at most {checkpoint.max_length} tokens and will read {max_length}; "
        "--max-length changes this": checkpoint.max_length != max_length,
        "its tokenizer pads on the right, so their package reads padding in all but the longest text of a batch; here "
        "each text has the embedding that it has there alone": not checkpoint.pads_left,
        "its decoder was trained too and is not imported: embeddings are the same, what they decode to is not": (
            checkpoint.own_decoder
        ),
    }
    return [note for note, applies in notes.items() if applies]
