"""A checkpoint of the authors as an encoder of ours: `python -m pipeline import-official DIR OUT [--backbone PATH]`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_tokenizer
from pipeline.core.artifacts import check_new, create
from pipeline.core.errors import ArtifactError, BackboneError
from pipeline.encoder.folder.config import EncoderConfig
from pipeline.export.official import format as official
from pipeline.export.official.files import fetch
from pipeline.export.official.reading import Linear, OfficialCheckpoint, read_checkpoint
from pipeline.export.official.tokenizer import check_reading

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.encoder.student import Student

# Of the norm: what rounding to another half precision may change in the backbone's embedding table.
_SAME_TABLE = 0.01
_COMPARED_ROWS = 2_000

_CARD = """\
---
library_name: llm2vec-gen-pipeline
pipeline_tag: sentence-similarity
tags: [embeddings, llm2vec-gen]
---
# Encoder of {backbone}, imported

An embedding of this model encodes what `{backbone}` would answer to the input (LLM2Vec-Gen). It was trained by the
authors' package and converted from {origin}. The backbone is frozen and not in this folder; its {tokens} new tokens, of
which the last {read} are read out, {adapted}and two linear layers are. Embeddings have {width} dimensions, are not
normalised, and are compared by cosine.

Texts are read bare, without a chat template, and are at most {max_query_tokens} tokens long. In the dtype that both run
in, embeddings are those of the authors' package; one text differs: the empty one, where the tokenizer has no start
token (an end-of-sequence token stands for it here).

Teacher: {teacher}. What it was trained on, how long and with which scores, its authors know.
"""


def import_official(
    source: str, out: Path, *, backbone: str | None = None, revision: str | None = None, max_length: int | None = None
) -> list[str]:
    """Write an encoder folder that embeds as their package does with a checkpoint of theirs.

    Args:
        source: a folder, or a name on the hub.
        out: a new folder.
        backbone: folder or name to take in place of the one that the checkpoint names.
        revision: commit of a checkpoint on the hub.
        max_length: longest input in tokens, new tokens included; None: 512, as their `encode` does.

    Returns:
        What the user should know, a line each.

    Raises:
        ArtifactError: `out` exists, or the checkpoint is not one of theirs, damaged, unsafe, or beyond our format.
        BackboneError: the backbone cannot be loaded, or is not the one of the checkpoint.
        TrainingError: the adapters do not fit the backbone.
    """
    from pipeline.encoder.folder.write import write_encoder

    check_new(out)
    folder, origin = fetch(source, revision)
    checkpoint = read_checkpoint(folder)
    params = BackboneParams(name=backbone or checkpoint.backbone)
    if not params.name:
        raise ArtifactError(
            f"{source}: its {official.RUN_CONFIG} names no backbone (model_name_or_path): --backbone does"
        )
    student = _student(checkpoint, source)
    length = max_length or official.MAX_LENGTH
    _check_length(length, len(checkpoint.texts), source)
    tokenizer = load_tokenizer(params)
    check_reading(folder, "".join(checkpoint.texts), checkpoint.ids, tokenizer)
    model = load_backbone(params)
    _check_backbone(checkpoint, model, params.name)
    config = _config(checkpoint, student, _identity(params.name), origin, length)
    adapter = _adapter(checkpoint, model, source)
    models = {"backbone": config.backbone, "teacher": config.teacher}
    with create(out, kind="encoder", params={"origin": origin, "max_length": length}, models=models) as writer:
        write_encoder(writer, student, tokenizer, config, rows=0, steps=0, adapter=adapter)
        (writer.path / "README.md").write_text(_card(config), encoding="utf-8")
    return _remarks(checkpoint, length)


def _check_length(max_length: int, new: int, source: str) -> None:
    if max_length <= new:
        raise ArtifactError(f"--max-length is {max_length}, the {new} new tokens of {source} leave no room for a text")


def _check_backbone(checkpoint: OfficialCheckpoint, model: Any, name: str) -> None:
    import torch

    embeddings = model.get_input_embeddings()
    if type(embeddings) is not torch.nn.Embedding:
        raise BackboneError(
            f"backbone {name}: its input embeddings are scaled ({type(embeddings).__name__}), no row fits"
        )
    found, expected = embeddings.weight.shape[1], checkpoint.rows.shape[1]
    if found != expected:
        raise BackboneError(
            f"backbone {name} has hidden size {found}, the checkpoint was trained on {expected} "
            f"({checkpoint.backbone}): give its backbone with --backbone"
        )
    if checkpoint.table is not None and not _same_table(embeddings.weight, checkpoint.table, checkpoint.ids):
        raise BackboneError(
            f"backbone {name} has other input embeddings than the checkpoint's, which was trained on "
            f"{checkpoint.backbone}: give its backbone with --backbone"
        )


def _same_table(ours: "Tensor", theirs: "Tensor", new: list[int]) -> bool:
    """Whether two embedding tables agree in the rows that both have; the new tokens' do not count."""
    import torch

    rows = torch.arange(shared := min(len(ours), len(theirs)))[:: max(1, shared // _COMPARED_ROWS)]
    rows = rows[~torch.isin(rows, torch.tensor(new))]
    first, second = ours[rows].float(), theirs[rows].float()
    return bool((first - second).norm() <= _SAME_TABLE * second.norm())


def _identity(name: str) -> dict[str, str]:
    """What pins a backbone that was just loaded. Their package reads whatever the hub holds: what it held is kept."""
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return identify(name, None)
    cached = try_to_load_from_cache(name, "config.json")
    return identify(name, Path(cached).parent.name if isinstance(cached, str) else None)


def _student(checkpoint: OfficialCheckpoint, source: str) -> "Student":
    from pipeline.encoder.student import Student

    tokens, hidden = checkpoint.rows.shape
    reconstruction = checkpoint.reconstruction or _unchanged(hidden)
    alignment = checkpoint.alignment or _unchanged(hidden)
    for name, layer, shape in (
        (official.RECONSTRUCTION, reconstruction, (hidden, hidden)),
        (official.ALIGNMENT, alignment, (len(alignment.bias), hidden)),
    ):
        if tuple(layer.weight.shape) != shape or len(layer.bias) != shape[0]:
            raise ArtifactError(
                f"{source}: {name} has shape {list(layer.weight.shape)}, with the rows of its new tokens it must be "
                f"{list(shape)}"
            )
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


def _unchanged(hidden: int) -> Linear:
    """The linear layer that stands for none."""
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
    """The adapters under our names, each with a place in the backbone."""
    from pipeline.backbone.lora import add_adapter, set_adapter

    if checkpoint.lora is None:
        return None
    # Theirs adapt the transformer without its head, ours the whole model.
    body = f"{official.PREFIX}{model.base_model_prefix}."
    tensors = {body + name.removeprefix(official.PREFIX): tensor.float() for name, tensor in checkpoint.adapter.items()}
    set_adapter(
        add_adapter(model, **checkpoint.lora.model_dump(), seed=0), tensors, where=f"{source}/{official.ENCODER}"
    )
    return tensors


def _card(config: EncoderConfig) -> str:
    return _CARD.format(
        backbone=config.backbone["name"],
        origin=", ".join(f"{key} `{value}`" for key, value in (config.origin or {}).items()),
        tokens=config.compression_tokens + config.thought_tokens,
        read=config.compression_tokens,
        adapted=f"LoRA adapters of rank {config.lora.rank} under which the backbone embeds, " if config.lora else "",
        width=config.width,
        max_query_tokens=config.max_query_tokens,
        teacher=config.teacher["name"],
    )


def _remarks(checkpoint: OfficialCheckpoint, max_length: int) -> list[str]:
    remarks = []
    if checkpoint.max_length != max_length:
        remarks.append(
            f"it was trained on inputs of at most {checkpoint.max_length} tokens and will read {max_length}: "
            "--max-length sets that"
        )
    if not checkpoint.pads_left:
        remarks.append(
            "its tokenizer pads on the right, so that in a batch their package reads padding in all but the longest "
            "text; here each text has the embedding that it has there alone"
        )
    if checkpoint.own_decoder:
        remarks.append(
            "its decoder was trained too and is not imported: embeddings are the same, what they decode to is not"
        )
    return remarks
