"""teach: data/queries, data/responses -> models/teacher, an LLM2Vec teacher of the backbone's own

Runs where embed.teacher.kind is llm2vec-trained; else it writes a manifest that says that none was asked for.

python -m pipeline.teach [--params params.yaml]
"""

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.backbone.loading import BackboneParams, identify, load_config
from pipeline.core.artifacts import Artifact, create, open_artifact
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import TeacherError
from pipeline.core.paths import QUERIES_DIR, RESPONSES_DIR, TEACHER_DIR, TRAINED_KIND
from pipeline.core.row_store import locked
from pipeline.core.run import RunRecord, record, setup_logging, user_errors, work_dir
from pipeline.embed.teachers import TeacherParams
from pipeline.embed.teachers.pooling import check_positions
from pipeline.teach.params import TeachParams

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher
    from pipeline.teach.quality import Quality
    from pipeline.teach.recipe import Finished

log = logging.getLogger(__name__)


class EmbedSection(Params, extra="ignore"):
    """The section `embed`, of which only the teacher counts here."""

    teacher: TeacherParams


class Folder(Params, extra="ignore"):
    """Where a section's local data is."""

    local_dir: str


class Inputs(Params):
    """The sections of params.yaml that this stage reads."""

    backbone: BackboneParams
    collect: Folder
    embed: EmbedSection
    teach: TeachParams
    evaluate: Folder


def run(inputs: Inputs, facts: RunRecord) -> None:
    """Train the teacher, or go on training it, measure it and write it.

    Raises:
        ArtifactError: the queries or responses are missing or damaged.
        SourceError: a source of text cannot be read.
        BackboneError: the backbone cannot be loaded, or its head is unknown.
        TeacherError: it cannot be trained with these params, or is no better than mean pooling and must be.
        EvaluationError: a task of teach.quality is missing.
        WorkError: the disk is full, or another process does the same work.
    """
    kind = inputs.embed.teacher.kind
    if kind != TRAINED_KIND:
        log.info("no teacher is trained: embed.teacher.kind is %s", kind)
        with create(TEACHER_DIR, kind="teacher", params={"asked": False, "embed.teacher.kind": kind}):
            pass
        facts.update(asked=False, kind=kind)
        return
    with locked(work_dir("teach")) as work:
        _teach(inputs, facts, work)


def _teach(inputs: Inputs, facts: RunRecord, work: Path) -> None:
    from pipeline.teach.corpus import corpus_texts, in_order
    from pipeline.teach.quality import find_quality_tasks, verdict

    params, teacher = inputs.teach, inputs.embed.teacher
    made_from = [open_artifact(path, path.name) for path in (QUERIES_DIR, RESPONSES_DIR)]
    # Before hours of training, what would be missed after them.
    tasks = find_quality_tasks(params.quality, Path(inputs.evaluate.local_dir))
    check_positions(load_config(inputs.backbone), teacher.max_tokens, "backbone")
    local_dir = Path(inputs.collect.local_dir)
    texts = in_order(corpus_texts(params.corpus, made_from[0], made_from[1], params.sources, local_dir))
    log.info("corpus %s: %d distinct texts", params.corpus, len(texts))
    phases = _trained(inputs, texts, work)
    quality = _measure(inputs, {name: phase.adapter for name, phase in phases.items()}, texts, tasks, work)
    facts.update(
        asked=True,
        corpus={"kind": params.corpus, "texts": len(texts)},
        **{name: _facts(phase) for name, phase in phases.items()},
        metrics=quality.metrics,
        deltas=quality.deltas,
        intrinsic=quality.intrinsic,
    )
    worse = verdict(quality)
    facts.update(worse_than_mean_pooling=worse)
    if worse and params.on_worse == "fail":
        facts.write()
        raise TeacherError(f"{worse}. teach.on_worse: warn goes on all the same; what is trained is kept")
    if worse:
        log.warning("%s", worse)
    _write(inputs, phases, made_from)


def _trained(inputs: Inputs, texts: list[str], work: Path) -> "dict[str, Finished]":
    """The phases by name; the model that they were trained on is let go."""
    from pipeline.teach.recipe import Recipe

    teacher = inputs.embed.teacher
    recipe = Recipe(inputs.teach, inputs.backbone, texts, template=teacher.template, pooling=teacher.pooling, work=work)
    return dict(zip(("mntp", "simcse"), recipe.run(), strict=True))


def _measure(inputs: Inputs, adapters: Mapping[str, Path], texts: list[str], tasks: list[Any], work: Path) -> "Quality":
    from pipeline.teach.quality import BASELINE, MNTP, SIMCSE, measure

    teacher = inputs.embed.teacher
    mntp, simcse = str(adapters["mntp"]), str(adapters["simcse"])
    return measure(
        {
            BASELINE: partial(_mean_pooling, inputs),
            MNTP: partial(_adapted, inputs, [mntp]),
            SIMCSE: partial(_adapted, inputs, [mntp, simcse]),
        },
        texts,
        tasks,
        inputs.teach.quality,
        work=work / "quality",
        batch_size=teacher.batch_size,
        dtype=teacher.dtype,
    )


def _mean_pooling(inputs: Inputs) -> "Teacher":
    from pipeline.embed.teachers.backbone import BackboneTeacher

    teacher = inputs.embed.teacher
    backbone = inputs.backbone.model_copy(update={"dtype": teacher.dtype})
    return BackboneTeacher.load(backbone, max_tokens=teacher.max_tokens, batch_size=teacher.batch_size)


def _adapted(inputs: Inputs, adapters: list[str]) -> "Teacher":
    from pipeline.embed.teachers.llm2vec import Llm2VecTeacher

    teacher = inputs.embed.teacher
    return Llm2VecTeacher.load(
        inputs.backbone.model_copy(update={"dtype": teacher.dtype}),
        [(adapter, None) for adapter in adapters],
        max_tokens=teacher.max_tokens,
        batch_size=teacher.batch_size,
        template=teacher.template,
        pooling=teacher.pooling,
    )


def _facts(phase: "Finished") -> dict[str, Any]:
    curve = phase.curve
    tenth = max(1, len(curve) // 10)
    return {
        "steps": len(curve),
        "first_loss": round(sum(curve[:tenth]) / tenth, 6),
        "last_loss": round(sum(curve[-tenth:]) / tenth, 6),
        **phase.facts,
    }


def _write(inputs: Inputs, phases: "Mapping[str, Finished]", made_from: list[Artifact]) -> None:
    """What was trained; how good it is stays in the record, so that measuring anew changes no byte here."""
    from pipeline.teach.card import model_card

    teacher, backbone = inputs.embed.teacher, identify(inputs.backbone.name, inputs.backbone.revision)
    params = inputs.teach.model_dump(mode="json", exclude={"checkpoint_every", "on_worse", "quality"})
    reading = {"template": teacher.template, "pooling": teacher.pooling}
    described: dict[str, Any] = {"asked": True, "teach": params, **reading}
    with create(TEACHER_DIR, kind="teacher", params=described, models={"backbone": backbone}, inputs=made_from) as out:
        for name, phase in phases.items():
            shutil.copytree(phase.adapter, out.path / name)
        card = model_card(
            backbone,
            phases={name: _facts(phase) for name, phase in phases.items()},
            params=params,
            template=teacher.template,
            pooled=_POOLED[teacher.pooling],
            mask_token=inputs.teach.mntp.mask_token,
        )
        (out.path / "README.md").write_text(card, encoding="utf-8")


_POOLED: dict[str, str] = {
    "mean": "the text's own tokens (not BOS)",
    "mean-all": "all its tokens, special ones included",
    "last": "the last token alone",
}

app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Train the backbone's own teacher, where one is asked for."""
    setup_logging()
    with user_errors(), record("teach") as facts:
        run(load(params, Inputs), facts)


if __name__ == "__main__":
    app()
