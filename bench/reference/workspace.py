"""The workspace of a comparison: the backbone and the student's weights that both sides read."""

from pathlib import Path

from bench.common import BACKBONE
from bench.reference.environment import SOURCE, readable_backbone

TOKENS = 10


def write_student(path: Path) -> None:
    """A student as the paper starts it, its teacher as wide as the backbone, rounded to bfloat16.

    Rounded, because the reference keeps it in the backbone's precision: both sides start from the same numbers.
    """
    from safetensors.torch import save_file

    from pipeline.backbone.loading import BackboneParams, load_backbone
    from pipeline.encoder.student import new_student

    backbone = load_backbone(BackboneParams(name=str(BACKBONE)))
    width = backbone.config.hidden_size
    student = new_student(backbone, width, compression_tokens=TOKENS, thought_tokens=0, seed=0)
    save_file({name: tensor.bfloat16().float() for name, tensor in student.state_dict().items()}, path)


def prepare_workspace(folder: Path) -> None:
    """Fill a new folder with `backbone`, `reference-source` and `student.safetensors`."""
    folder.mkdir(parents=True)
    readable_backbone(BACKBONE, folder / "backbone")
    (folder / "reference-source").symlink_to(SOURCE)
    write_student(folder / "student.safetensors")
