"""An encoder folder to give away: `python -m pipeline export-st MODEL OUT`.

It has the trained files unchanged, this version's module file and prompts, and scores in the model card.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.artifacts import Artifact, check_new, open_artifact, read_manifest
from pipeline.core.errors import ArtifactError
from pipeline.core.files import disk_errors
from pipeline.core.folders import scratch_beside
from pipeline.encoder.folder.card import CARD_FILE, with_results
from pipeline.encoder.folder.config import START_FILE
from pipeline.encoder.folder.st_files import write_st_files
from pipeline.evaluate.comparison import Comparison, compare
from pipeline.probe.descriptions import describe

log = logging.getLogger(__name__)

# Systems to compare the student with; the report has the others.
SHOWN = (
    *("student", "start", "teacher", "untrained-standardized", "untrained-decorrelated"),
    *("backbone-mean-standardized", "echo-standardized", "echo-decorrelated"),
)
_KINDS = ("evaluate", "probe")


def publish(model: Path, out: Path, results: Path | None = None) -> list[str]:
    """Write the verified encoder folder `model` as a new folder `out`, without this pipeline's manifest.

    The card shows the evaluations of this encoder in the folder `results`; their names are returned. Raises
    ArtifactError if the encoder is missing or damaged, `results` is no folder, a record is damaged, or `out` exists.
    """
    artifact = open_artifact(model, "encoder")
    check_new(out)
    if results is not None and not results.is_dir():
        raise ArtifactError(
            f"{results} is no folder: give the one that evaluate and probe write to", argument="results"
        )
    comparisons = list(_comparisons(artifact, results)) if results else []
    if results is not None and not comparisons:
        log.warning("%s holds no evaluation of %s: the card shows no scores", results, model)
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(out) as scratch:
            folder = scratch / "model"
            _copy(artifact, folder)
            card = (folder / CARD_FILE).read_text(encoding="utf-8").replace('"DIR"', json.dumps(out.name))
            tables = [table for comparison in comparisons for table in (_table(comparison), _stored_table(comparison))]
            card = with_results(card, [table for table in tables if table])
            (folder / CARD_FILE).write_text(card, encoding="utf-8")
            folder.rename(out)
    return [comparison.name for comparison in comparisons]


def _copy(artifact: Artifact, folder: Path) -> None:
    for name in artifact.manifest.files.keys() - {START_FILE}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / name, folder / name)
    config = json.loads((folder / "encoder_config.json").read_text(encoding="utf-8"))
    write_st_files(folder, lora=config.get("lora") is not None)


def _comparisons(encoder: Artifact, results: Path) -> Iterator[Comparison]:
    """The evaluations in `results` that have a score of this encoder."""
    for kind in _KINDS:
        for path in sorted((results / kind).glob("*.json")):
            if not _is_of(encoder, path.with_suffix("")):
                log.warning("%s is no evaluation of %s as it is now: not in the card", path, encoder.path)
                continue
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                comparison = compare(path.stem, record, describe(path.stem).lower_is_better)
            except ValueError as error:
                raise ArtifactError(f"{path} is damaged ({error}): run its stage again") from None
            if "student" in comparison.systems:
                yield comparison


def _is_of(encoder: Artifact, evaluation: Path) -> bool:
    try:
        return encoder.digest in read_manifest(evaluation).manifest.inputs.values()
    except ArtifactError:
        return False


def _table(comparison: Comparison) -> str:
    """One evaluation as a Markdown table: a row for each score (↓: lower is better), a column for each system."""
    at = [index for index, system in enumerate(comparison.systems) if system in SHOWN]
    names = [comparison.systems[index] for index in at]
    lines = [f"### {comparison.name}", "", f"| | {' | '.join(names)} |", "|---" * (len(at) + 1) + "|"]
    for row in comparison.rows:
        scores = [row.cells[index].score for index in at]
        lower = " ↓" if row.lower_is_better else ""
        lines.append(f"| {row.metric}{lower} | {' | '.join(_number(score) for score in scores)} |")
    return "\n".join(lines)


def _stored_table(comparison: Comparison) -> str:
    """What fewer dimensions or bits cost, means of the suite only; empty if it was not measured."""
    if not comparison.stored:
        return ""
    shown = [row.metric for row in comparison.rows if row.summary]
    lines = [f"### {comparison.name}, in fewer dimensions or bits", ""]
    lines += [f"| stored as | dimensions | bytes of a million | {' | '.join(shown)} |", "|---" * (len(shown) + 3) + "|"]
    for form in comparison.stored:
        scores = " | ".join(_number(form.cells[metric].score if metric in form.cells else None) for metric in shown)
        lines.append(f"| {form.stored} | {form.dimensions:,} | {form.bytes:,} | {scores} |")
    return "\n".join(lines)


def _number(score: float | int | None) -> str:
    return "" if score is None else f"{score:.4g}"
