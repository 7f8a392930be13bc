"""Few rows through generate, embed and a few steps of train, with the functions of these stages.

What a stage raises becomes a problem, and the stages behind it are left out.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.backbone.device import best_device, release_memory
from pipeline.backbone.loading import BackboneParams, load_tokenizer
from pipeline.backbone.prompting import FormattedPrompt
from pipeline.collect.params import CollectParams
from pipeline.core.artifacts import read_manifest
from pipeline.core.config import Params
from pipeline.core.errors import ArtifactError, PipelineError, TeacherError, section
from pipeline.core.gates import gate_problems
from pipeline.core.paths import TEACHER_DIR
from pipeline.core.row_store import ShardStore
from pipeline.core.run import device_memory, gpu_memory_mib, peak_memory_mib
from pipeline.core.schemas import RESPONSES, targets_schema
from pipeline.embed.build import make_embedder, make_finish
from pipeline.embed.params import EmbedParams, TeacherParams
from pipeline.embed.statistics import CAUSES as TARGET_CAUSES
from pipeline.embed.statistics import TargetStatistics
from pipeline.embed.targets import QueriesOf, Row, UsableResponses, fingerprint, store_schema
from pipeline.embed.teachers.pool import open_teacher
from pipeline.embed.teachers.registry import TEACHERS
from pipeline.generate.engines.registry import ENGINES
from pipeline.generate.generator import answer_content, make_generator, measured
from pipeline.generate.params import GenerateParams
from pipeline.generate.response_counts import CAUSES as ANSWER_CAUSES
from pipeline.generate.response_counts import MANY_CUT, STORE, ResponseCounts
from pipeline.train.params import HeldoutParams, TrainParams, WarmStartParams
from pipeline.train.plan import check_response_form

if TYPE_CHECKING:
    from pipeline.train.data import TrainingRows

# Optimiser steps; the first one compiles kernels on a GPU, so a mean over few steps is an upper bound.
STEPS = 3


@dataclass(frozen=True)
class Sections:
    """The sections of params.yaml behind the stages."""

    backbone: BackboneParams
    collect: CollectParams
    generate: GenerateParams
    embed: EmbedParams
    train: TrainParams


@dataclass(frozen=True)
class Speed:
    """What a stage did in how many seconds, its start not counted; `flops` are operations, 0 where not counted."""

    rows: int
    tokens: int
    seconds: float
    flops: float = 0.0
    startup_seconds: float = 0.0


@dataclass
class Preview:
    """What became of the queries.

    Attributes:
        queries: schema QUERIES.
        prompts: of each query, as the model reads it to answer; `trained_prompts`: as it does in train.
        answers: schema `response_counts.STORE`; none where generate failed.
        cuts: what was cut of a row, by its id.
        targets: schema `targets_schema`, as train gets them; none where embed failed.
        losses: of each step, see `Trainer.curve`; those of the first are before any update.
        speeds: by stage.
        memory: peak of the main memory of this process, and what is in use on each GPU, in MiB, after each stage.
        problems: what looks wrong; `notes`: what is done otherwise here than in a run.
    """

    queries: pa.Table
    prompts: list[str] = field(default_factory=list)
    trained_prompts: list[str] = field(default_factory=list)
    answers: pa.Table = field(default_factory=STORE.empty_table)
    cuts: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    targets: pa.Table = field(default_factory=targets_schema(1, "float32").empty_table)
    losses: list[dict[str, float]] = field(default_factory=list)
    speeds: dict[str, Speed] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run_stages(sections: Sections, queries: pa.Table, scratch: Path) -> Preview:
    """The queries through the stages; what they store of it lies in the folder `scratch`."""
    found = Preview(queries)
    for name, (stage, params) in STAGES.items():
        try:
            with section(name), device_memory(*params, expandable=False):
                stage(sections, found, scratch)
        except PipelineError as error:
            found.problems.append(f"{name} fails: {error}")
            break
        finally:
            release_memory()
            found.memory[name] = {"main memory": peak_memory_mib(), **gpu_memory_mib()}
    return found


def _generate(sections: Sections, found: Preview, scratch: Path) -> None:
    params, backbone = sections.generate, sections.backbone
    tokenizer, ids = load_tokenizer(backbone), found.queries["id"].combine_chunks()
    # Failed rows are shown, whatever their share.
    lenient = params.model_copy(update={"max_failed_fraction": 1.0})
    with ShardStore(scratch / "generate", STORE, answer_content(backbone, params)) as store:
        generator = make_generator(backbone, lenient, store)
        prompts = generator.formatter.batch(found.queries["text"].to_pylist())
        found.prompts = [tokenizer.decode(prompt.token_ids) for prompt in prompts]
        if ENGINES[params.engine].runs_on == "endpoint" and params.options.get("api") != "completions":
            found.notes.append(
                "the server gets the bare query and puts its own chat template around it: the prompts above are the "
                "backbone's (generate.options.api: completions sends these)"
            )
        generator.run(lambda: [ids], [found.queries])
        [found.answers] = generator.tables([ids], len(ids))
    counts = ResponseCounts()
    for _ in counts.through([found.answers]):
        pass
    for row in found.answers.to_pylist():
        if row["truncated"]:
            found.cuts[row["id"]].append(f"the query, at generate.max_prompt_tokens {params.max_prompt_tokens}")
        if row["finish_reason"] == "length":
            found.cuts[row["id"]].append(f"the answer, at generate.max_new_tokens {params.max_new_tokens}")
    facts, failed = generator.facts, len(generator.failed)
    found.speeds["generate"] = Speed(
        len(ids), facts.response_tokens, facts.generate_seconds, startup_seconds=facts.startup_seconds
    )
    if failed > params.max_failed_fraction * facts.rows:
        reason = next(iter(generator.failed.values()))["error"]
        limit = f"the limit is max_failed_fraction {params.max_failed_fraction:g}"
        found.problems.append(f"generate: {failed} of {facts.rows} rows failed, e.g. {reason}; {limit}")
    shares = measured(params, counts)
    if MANY_CUT < shares["cut"] <= params.gates.cut:
        found.notes.append(f"{shares['cut']:.0%} of the answers end at generate.max_new_tokens {params.max_new_tokens}")
    _add_gates("generate", params.gates, shares, ANSWER_CAUSES, found)


def _embed(sections: Sections, found: Preview, scratch: Path) -> None:
    params = sections.embed.model_copy(update={"teacher": _teacher(sections.embed.teacher, found)})
    responses = UsableResponses(lambda: [found.answers], sections.generate.samples_per_query)
    rows = list(responses)
    if not rows:
        raise TeacherError(f"no answer is usable: {dict(responses.skipped)}")
    with (
        open_teacher(params.teacher, sections.backbone, 1) as teacher,
        ShardStore(scratch / "embed", store_schema(teacher.width), fingerprint(teacher)) as store,
    ):
        embedder, of_queries = make_embedder(store, teacher, params), _of_queries(params, rows, found)
        embedder.run(responses, of_queries)
        finish, transform_facts = make_finish(embedder, responses, (row.id for row in rows), params)
        [stored] = embedder.tables(rows, len(rows))
        statistics = TargetStatistics()
        made = [finish.beside(stored, queries) for queries in embedder.tables(of_queries, len(rows))]
        [targets] = statistics.through(made or [finish(stored)])
    if (kind := params.transform.kind) != "none":
        chosen = "" if kind == transform_facts["kind"] else f" ({transform_facts['kind']})"
        found.notes.append(f"embed.transform {kind}{chosen} is fitted on these {len(rows)} rows alone")
    for row_id, cut in zip(stored["id"].to_pylist(), stored["truncated"].to_pylist(), strict=True):
        if cut:
            found.cuts[row_id].append(f"the answer for the teacher, at embed.teacher.max_tokens {teacher.max_tokens}")
    found.targets = targets
    found.speeds["embed"] = Speed(len(stored), embedder.computed_tokens, embedder.seconds)
    _add_gates("embed", params.gates, statistics.measures(), TARGET_CAUSES, found)


def _of_queries(params: EmbedParams, rows: Sequence[Row], found: Preview) -> list[Row]:
    """The queries of these responses, if the teacher is to embed them."""
    texts = sorted(zip(*(found.queries[name].to_pylist() for name in ("id", "text")), strict=True))
    return list(QueriesOf(rows, lambda: iter(texts))) if params.queries else []


def _teacher(params: TeacherParams, found: Preview) -> TeacherParams:
    """The teacher of the params; for one that is not trained yet, the bare backbone."""
    if not TEACHERS[params.kind].trained_here:
        return params
    try:
        trained = read_manifest(TEACHER_DIR).manifest.params.get("asked")
    except ArtifactError:
        trained = False
    if not trained:
        found.notes.append("the teacher is not trained yet: the targets are of the backbone as it is")
        return params.model_copy(update={"kind": "backbone"})
    return params


def _train(sections: Sections, found: Preview, scratch: Path) -> None:
    from accelerate import Accelerator

    from pipeline.train.build import assemble, make_rows, query_formatter
    from pipeline.train.data import join

    params = sections.train
    check_response_form(params, sections.embed)
    if params.shard_backbone:
        found.notes.append("no step of train: train.shard_backbone divides the backbone among processes")
        return
    if params.warm_start.enabled:
        found.notes.append(
            "the steps begin at a random start: a closed form of so few rows would only repeat their targets"
        )
    few = params.model_copy(
        update={
            "warm_start": WarmStartParams(),
            "refine": None,
            "epochs": STEPS,
            "stop_after_steps": STEPS,
            "heldout": HeldoutParams(),
        }
    )
    tokenizer = load_tokenizer(sections.backbone)
    formatter = query_formatter(params, sections.backbone, tokenizer)
    prompts = formatter.batch(found.queries["text"].to_pylist())
    new = params.thought_tokens + params.compression_tokens
    found.trained_prompts = [f"{tokenizer.decode(prompt.token_ids)} + {new} new tokens" for prompt in prompts]
    answers = found.answers.select(RESPONSES.names)
    joined = join(found.queries, answers, found.targets)
    rows = make_rows(few, [joined], "try", tokenizer, formatter, scratch / "train")
    _note_cuts(found, params, prompts, rows)
    trainer = assemble(
        few,
        sections.backbone,
        tokenizer,
        rows,
        None,
        accelerator=Accelerator(cpu=best_device() == "cpu"),
        checkpoint=None,
        frame_ids=formatter("").token_ids,
    )
    trainer.run()
    found.losses, done = trainer.curve, trainer.throughput
    found.speeds["train"] = Speed(done.rows, done.tokens, done.seconds, done.flops)


def _note_cuts(found: Preview, params: TrainParams, prompts: Sequence[FormattedPrompt], rows: "TrainingRows") -> None:
    trained = {row_id: len(ids) for row_id, ids in zip(rows.ids, rows.response_ids, strict=True)}
    for row_id, prompt in zip(found.queries["id"].to_pylist(), prompts, strict=True):
        if prompt.truncated:
            found.cuts[row_id].append(f"the query in train, at train.max_query_tokens {params.max_query_tokens}")
        if trained.get(row_id) == params.max_response_tokens:
            found.cuts[row_id].append(f"the answer in train reaches train.max_response_tokens {trained[row_id]}")
    for row_id in found.targets["id"].to_pylist():
        if row_id not in trained:
            found.cuts[row_id].append("the row in train, by train.drop_loops")


def _add_gates(
    stage: str, gates: Params, measures: Mapping[str, float], causes: Mapping[str, str], found: Preview
) -> None:
    problems = gate_problems(gates, measures, causes)
    found.problems += [f"{stage}.gates.{name}: {problem}" for name, problem in problems.items()]


# Each stage, and the params to lower where the memory of a device is full.
STAGES: dict[str, tuple[Callable[[Sections, Preview, Path], None], tuple[str, ...]]] = {
    "generate": (_generate, ("generate.options",)),
    "embed": (_embed, ("embed.teacher.batch_tokens",)),
    "train": (_train, ("train.micro_batch_size", "train.max_tokens_per_batch")),
}
