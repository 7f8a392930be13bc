"""teach: data/queries, data/responses -> models/teacher, an LLM2Vec teacher trained from the backbone

Runs where embed.teacher.kind is llm2vec-trained; else it writes a manifest that says that none was asked for.

python -m pipeline.teach [--params params.yaml]
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.backbone.loading import BackboneParams, identify, load_config
from pipeline.core.artifacts import Artifact, create, open_artifact
from pipeline.core.config import PARAMS_FILE, Params, load
from pipeline.core.errors import TeacherError, nested_in, section
from pipeline.core.paths import QUERIES_DIR, RESPONSES_DIR, TEACHER_DIR
from pipeline.core.row_store import locked
from pipeline.core.run import RunRecord, device_memory, prepare_process, record, user_errors, work_dir
from pipeline.core.sources import SourceDigests
from pipeline.embed.params import TeacherSection
from pipeline.embed.teachers.pooling import check_positions
from pipeline.embed.teachers.registry import TEACHERS
from pipeline.teach.params import TeachParams

if TYPE_CHECKING:
    from pipeline.embed.teachers.base import Teacher
    from pipeline.teach.quality import Quality
    from pipeline.teach.recipe import TrainedPhase

log = logging.getLogger(__name__)

# Texts of the corpus over which the echo reading is standardised.
STANDARDIZED_TEXTS = 1000

# Of a model card: the pooled tokens by `pooling`.
POOLED_TOKENS = {
    "mean": "the text's own tokens (not BOS)",
    "mean-all": "all its tokens, special ones included",
    "last": "the last token alone",
}
# What to lower where the memory of a device is full.
MEMORY_PARAMS = ("teach.mntp.micro_batch_size", "teach.simcse.micro_batch_size", "embed.teacher.batch_tokens")


class LocalData(Params, extra="ignore"):
    """A section's folder of local data."""

    local_dir: str


class Inputs(Params):
    """The sections of params.yaml that this stage reads."""

    backbone: BackboneParams
    collect: LocalData
    embed: TeacherSection
    teach: TeachParams
    evaluate: LocalData


def run(inputs: Inputs, run_record: RunRecord) -> None:
    """Train or resume the teacher, measure it and write it.

    Raises:
        ArtifactError: the queries or responses are missing or damaged.
        SourceError: a source of text cannot be read.
        BackboneError: the backbone cannot be loaded, or its head is unknown.
        TeacherError: it cannot be trained with these params, or is worse than a reading and on_worse is fail.
        EvaluationError: a task of `quality` is missing.
        WorkError: the disk is full, or another process does the same work.
    """
    kind = inputs.embed.teacher.kind
    if not TEACHERS[kind].trained_here:
        log.info("no teacher is trained: embed.teacher.kind is %s", kind)
        with create(TEACHER_DIR, kind="teacher", params={"asked": False, "embed.teacher.kind": kind}):
            pass
        run_record.update(asked=False, kind=kind)
        return
    with section("teach"), locked(work_dir("teach")) as work:
        _teach(inputs, run_record, work)


def _teach(inputs: Inputs, run_record: RunRecord, work: Path) -> None:
    from pipeline.teach.corpus import corpus_texts, hash_ordered
    from pipeline.teach.quality import find_quality_tasks, worse_than_untrained
    from pipeline.teach.recipe import Recipe

    params, teacher = inputs.teach, inputs.embed.teacher
    queries, responses = (open_artifact(path, path.name) for path in (QUERIES_DIR, RESPONSES_DIR))
    # Checked before hours of training.
    tasks = find_quality_tasks(params.quality, Path(inputs.evaluate.local_dir))
    config = load_config(inputs.backbone)
    with section("embed"), nested_in("teacher"):
        check_positions(config, teacher.max_tokens)
    digests = SourceDigests(Path(inputs.collect.local_dir))
    texts = hash_ordered(corpus_texts(params.corpus, queries, responses, params.sources, digests))
    log.info("corpus %s: %d distinct texts", params.corpus, len(texts))
    recipe = Recipe(params, inputs.backbone, texts, template=teacher.template, pooling=teacher.pooling, work=work)
    phases = recipe.run()
    del recipe  # and the model that it holds
    quality = _measure(inputs, {name: phase.adapter for name, phase in phases.items()}, texts, tasks, work)
    worse = worse_than_untrained(quality)
    run_record.update(
        asked=True,
        corpus={"kind": params.corpus, "texts": len(texts)},
        **{name: phase.summary() for name, phase in phases.items()},
        metrics=quality.metrics,
        deltas=quality.deltas,
        intrinsic=quality.intrinsic,
        worse_than_untrained=worse,
    )
    if worse and params.on_worse == "fail":
        run_record.write()
        raise TeacherError(f"{worse}. Set warn to use it all the same, without further training", argument="on_worse")
    if worse:
        log.warning("%s", worse)
    _write(inputs, phases, [queries, responses], digests.found)


def _measure(inputs: Inputs, adapters: Mapping[str, Path], texts: list[str], tasks: list[Any], work: Path) -> "Quality":
    from pipeline.embed.teachers.adapters import AdapterParams
    from pipeline.embed.teachers.backbone import load_backbone_teacher
    from pipeline.embed.teachers.llm2vec import load_llm2vec
    from pipeline.embed.teachers.template import TEMPLATES
    from pipeline.teach.quality import BASELINE, ECHO, MNTP, SIMCSE, load_standardized, measure

    teacher = inputs.embed.teacher
    shared: dict[str, Any] = teacher.model_dump(include={"max_tokens", "dtype", "batch_tokens"})
    adapted = partial(load_llm2vec, inputs.backbone, template=teacher.template, pooling=teacher.pooling, **shared)
    mntp, simcse = (AdapterParams(name=str(adapters[phase])) for phase in ("mntp", "simcse"))
    echo = partial(load_backbone_teacher, inputs.backbone, template=TEMPLATES["echo"], **shared)
    teachers = {
        BASELINE: partial(_load, load_backbone_teacher, inputs.backbone, **shared),
        ECHO: partial(_load, load_standardized, echo, texts[:STANDARDIZED_TEXTS]),
        MNTP: partial(_load, adapted, [mntp]),
        SIMCSE: partial(_load, adapted, [mntp, simcse]),
    }
    return measure(
        teachers,
        texts,
        tasks,
        inputs.teach.quality,
        work=work / "quality",
        dtype=teacher.dtype,
    )


def _load(load: "Callable[..., Teacher]", *args: Any, **kwargs: Any) -> "Teacher":
    """A teacher of the section `embed`, whose keys its errors name."""
    with section("embed"), nested_in("teacher"):
        return load(*args, **kwargs)


def _write(
    inputs: Inputs, phases: "Mapping[str, TrainedPhase]", artifacts: list[Artifact], sources: Mapping[str, str]
) -> None:
    """Write the adapters; their quality stays in the record, so that measuring again changes no byte here."""
    from pipeline.teach.card import model_card

    teacher, backbone = inputs.embed.teacher, identify(inputs.backbone.name, inputs.backbone.revision)
    params = inputs.teach.model_dump(mode="json", exclude={"checkpoint_every", "on_worse", "quality"})
    recorded = {"asked": True, "teach": params, "template": teacher.template, "pooling": teacher.pooling}
    with create(
        TEACHER_DIR,
        kind="teacher",
        params=recorded,
        models={"backbone": backbone},
        inputs=artifacts,
        sources=sources,
    ) as out:
        for name, phase in phases.items():
            shutil.copytree(phase.adapter, out.path / name)
        card = model_card(
            backbone,
            phases={name: phase.summary() for name, phase in phases.items()},
            params=params,
            template=teacher.template,
            pooled=POOLED_TOKENS[teacher.pooling],
            mask_token=inputs.teach.mntp.mask_token,
        )
        (out.path / "README.md").write_text(card, encoding="utf-8")


app = typer.Typer(add_completion=False)


@app.command()
def main(params: Annotated[Path, typer.Option(help="params file")] = PARAMS_FILE) -> None:
    """Train the backbone's own teacher, where one is asked for."""
    prepare_process()
    with user_errors(), device_memory(*MEMORY_PARAMS), record("teach") as run_record:
        run(load(params, Inputs), run_record)


if __name__ == "__main__":
    app()
