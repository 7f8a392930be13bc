"""The workspace of a comparison: backbone, tokenizer, student, our encoder folder and the texts."""

from collections.abc import Mapping
from pathlib import Path

from bench.common import BACKBONE
from bench.encoding.workloads import Workload, save
from bench.reference.workspace import prepare_workspace

# The reference cuts a text and the new tokens behind it together to this length.
LIMIT = 512


def prepare(folder: Path, workloads: Mapping[str, Workload]) -> None:
    """Fill a new folder."""
    prepare_workspace(folder)
    (folder / "tokenizer").symlink_to(BACKBONE)
    write_encoder_folder(folder / "student.safetensors", folder / "encoder")
    save(folder, workloads)


def write_encoder_folder(student_file: Path, folder: Path) -> None:
    """An encoder folder with a student's tensors that reads the text itself, as the reference does."""
    from safetensors.torch import load_file

    from pipeline.backbone.loading import BackboneParams, identify, load_tokenizer
    from pipeline.core.artifacts import create
    from pipeline.encoder.folder.config import EncoderConfig
    from pipeline.encoder.folder.write import write_encoder
    from pipeline.encoder.student import Student

    weights = load_file(student_file)
    tokens, hidden = weights["tokens"].shape
    width = len(weights["alignment.weight"])
    student = Student(hidden, width, tokens)
    student.load_state_dict(weights)
    config = EncoderConfig(
        backbone=identify(str(BACKBONE), None),
        chat_template_kwargs={},
        template="raw",
        max_query_tokens=LIMIT - tokens,
        compression_tokens=tokens,
        thought_tokens=0,
        hidden=hidden,
        width=width,
        teacher={"name": "none"},
    )
    with create(folder, kind="encoder", params={}) as out:
        write_encoder(out, student, load_tokenizer(BackboneParams(name=str(BACKBONE))), config, rows=0, steps=0)
