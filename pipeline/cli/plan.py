"""Check the whole params file and plan each stage: `python -m pipeline params`.

Estimates (GB = 1e9 bytes) are upper bounds for rows of full length: weights and KV cache of `generate` from the
backbone's sizes, the memory of a training step by the formulas of `pipeline.optim.memory`. The CUDA context, the
kernels and the allocator take 1 to 2 GB more.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.backbone.loading import DTYPE_BYTES, BackboneParams
from pipeline.backbone.prompting import SLOT, check_instructions_stay
from pipeline.backbone.sizes import ModelSizes, sizes_from_config
from pipeline.cli.presets import preset_of
from pipeline.collect.params import CollectParams
from pipeline.core.artifacts import read_manifest
from pipeline.core.config import EntryName, Params, read_yaml, validate
from pipeline.core.errors import (
    ArtifactError,
    BackboneError,
    EvaluationError,
    ParamsError,
    SourceError,
    first_line,
    section,
)
from pipeline.core.paths import QUERIES_DIR, REPORT_PAGES
from pipeline.core.readers import LocalSource, find_files
from pipeline.core.sources import is_within
from pipeline.embed.params import EmbedParams
from pipeline.embed.teachers.registry import TEACHERS
from pipeline.evaluate.params import EvaluateParams
from pipeline.evaluate.plan import EvaluationPlan, mteb_tasks
from pipeline.generate.engines.registry import ENGINES
from pipeline.generate.params import GenerateParams
from pipeline.optim.memory import kv_bytes
from pipeline.probe.base import all_probe_params
from pipeline.report import ReportParams
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import SuiteParams
from pipeline.teach.params import TeachParams
from pipeline.teach.plan import teach_memory_line
from pipeline.train.params import TrainParams, check_instructions, planned_steps
from pipeline.train.plan import check_response_form, memory_line, memory_remarks

GB = 1e9
# Transforms after which each dimension has variance 1, whatever the teacher: a mean over them that starts at 1.
UNIT_VARIANCE = ("standardize", "whiten")


class AllParams(Params):
    """Every section of params.yaml."""

    backbone: BackboneParams
    collect: CollectParams
    generate: GenerateParams
    teach: TeachParams = Field(default_factory=TeachParams)
    embed: EmbedParams
    train: TrainParams
    evaluate: EvaluateParams
    suites: dict[EntryName, SuiteParams] = Field(min_length=1)
    probes: dict[EntryName, dict[str, Any]] = Field(min_length=1)
    report: ReportParams


@dataclass
class Plan:
    """What a run will do.

    Attributes:
        lines: (stage, what it does, on what and how large), in the order of the run.
        remarks: what a user should know before it starts, a params key first.
    """

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def load_all(path: Path) -> AllParams:
    """The whole file, each section checked; ParamsError with one line for each mistake in the file."""
    content = read_yaml(path)
    mistakes: list[str] = []
    params: AllParams | None = None
    try:
        params = validate(content, AllParams, where=str(path))
    except ParamsError as error:
        mistakes.append(str(error))
    try:
        if isinstance(content.get("probes"), Mapping):
            all_probe_params(content["probes"], str(path))
    except ParamsError as error:
        mistakes.append(str(error))
    if mistakes or params is None:
        raise ParamsError("\n".join(mistakes))
    return params


def make_plan(params: AllParams, root: Path = Path()) -> Plan:
    """What each stage will do with these params, as far as known before it runs.

    Raises:
        EvaluationError: mteb does not know a task or benchmark (of teach.quality too), or a task has no instruction.
        ParamsError: evaluate.instructions names a file that is missing or has mistakes.
        BackboneError: too_long of generate or train would cut an instruction of collect.sources.
        TrainingError: train.template does not fit the instructions of collect.sources, or train.response_form embed.
    """
    sources = params.collect.model_dump()["sources"]
    with section("generate"):
        check_instructions_stay(params.generate.too_long, sources)
    with section("train"):
        check_instructions(params.train, sources)
        check_response_form(params.train, params.embed)
    with section("backbone"):
        sizes = backbone_sizes(params.backbone, root)
    rows, known = expected_rows(params, root)
    plan = Plan()
    plan.lines.append(("collect", _sources(params), _rows_text(rows, known)))
    plan.lines.append(("generate", _generate_text(params, rows), _generate_memory(params, sizes)))
    if TEACHERS[params.embed.teacher.kind].trained_here:
        _check_quality(params.teach)
        plan.lines.append(("teach", _teach_text(params.teach), _teach_memory(params, sizes)))
    plan.lines.append(("embed", _embed_text(params, rows), _teacher_text(params)))
    plan.lines.append(("train", _train_text(params, rows), _train_memory(params, sizes)))
    evaluation = EvaluationPlan(params.evaluate, params.suites, params.probes, root)
    answer_tokens = params.evaluate.answers.max_new_tokens or params.generate.max_new_tokens
    plan.lines += evaluation.lines(max_tokens=params.train.max_query_tokens, answer_tokens=answer_tokens)
    plan.lines.append(("report", params.report.title, REPORT_PAGES[0].as_posix()))
    plan.remarks = _remarks(params, sizes, root) + evaluation.remarks()
    return plan


def backbone_sizes(backbone: BackboneParams, root: Path = Path()) -> ModelSizes | None:
    """The backbone's sizes from a local config, the presets or the hub's cache; None without any.

    Raises BackboneError if the config is damaged.
    """
    config = root / backbone.name / "config.json"
    if config.is_file():
        return sizes_from_config(model_config(config))
    preset = preset_of(backbone.name)
    return preset.sizes if preset else _sizes_from_cache(backbone)


def _sizes_from_cache(backbone: BackboneParams) -> ModelSizes | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(backbone.name, "config.json", revision=backbone.revision)
    except HFValidationError:  # a path that is no folder here, and no name of the hub
        return None
    return sizes_from_config(model_config(Path(found))) if isinstance(found, str) else None


def model_config(path: Path) -> dict[str, Any]:
    """The mapping in a model's config.json; raises BackboneError if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path} cannot be read: {first_line(error)}", argument="name") from None
    if not isinstance(found, dict):
        raise BackboneError(f"{path} must hold a mapping, not {type(found).__name__}", argument="name")
    return found


def expected_rows(params: AllParams, root: Path = Path()) -> tuple[int | None, bool]:
    """The most queries that there will be (None: no bound), and whether they exist already."""
    with suppress(ArtifactError):
        made = read_manifest(root / QUERIES_DIR).manifest
        if made.params == params.collect.model_dump(mode="json"):
            return made.rows, True
    limits = [source.limit for source in params.collect.sources]
    bounds = [params.collect.sample, None if None in limits else sum(limit for limit in limits if limit)]
    return min((bound for bound in bounds if bound is not None), default=None), False


def _sources(params: AllParams) -> str:
    collect = params.collect
    filters = {
        "near duplicates": collect.near_duplicates,
        "texts of the evaluation": collect.decontaminate,
        f"other languages than {', '.join(collect.languages or [])}": collect.languages,
    }
    without = ", ".join(name for name, setting in filters.items() if setting)
    sources = f"{', '.join(source.label for source in collect.sources)} (local files: {collect.local_dir})"
    return f"{sources}, without {without}" if without else sources


def _rows_text(rows: int | None, known: bool) -> str:
    if rows is None:
        return "all queries of the sources"
    return f"{rows:,} queries, made already" if known else f"at most {rows:,} queries"


def _tokens(rows: int | None, each: int) -> str:
    return f"at most {rows * each:,} tokens" if rows is not None else f"at most {each:,} tokens a row"


def _generate_text(params: AllParams, rows: int | None) -> str:
    generate = params.generate
    how = "greedy" if generate.temperature == 0 else f"temperature {generate.temperature}"
    if generate.samples_per_query > 1:
        how += f", {generate.samples_per_query} samples a query"
    return f"{generate.engine}, {how}; {_tokens(rows, generate.samples_per_query * generate.max_new_tokens)} written"


def _generate_memory(params: AllParams, sizes: ModelSizes | None) -> str:
    generate = params.generate
    if sizes is None:
        return f"{params.backbone.name}, {generate.dtype}"
    weights = sizes.parameters() * DTYPE_BYTES[generate.dtype]
    row = (generate.max_prompt_tokens + generate.max_new_tokens) * kv_bytes(sizes, generate.dtype)
    return f"{params.backbone.name}, weights {weights / GB:.1f} GB, KV cache {row / GB:.2f} GB a row of full length"


def _teach_text(teach: TeachParams) -> str:
    phases = [
        f"{name} {phase.steps:,} steps of {phase.batch_size} texts, at most {phase.max_tokens} tokens"
        for name, phase in (("MNTP", teach.mntp), ("SimCSE", teach.simcse))
    ]
    measured = ", ".join([*teach.quality.local, *teach.quality.tasks]) or "no task"
    return f"{'; '.join(phases)}; from {teach.corpus}; measured on {measured}"


def _check_quality(teach: TeachParams) -> None:
    try:
        mteb_tasks({"tasks": teach.quality.tasks}, load_instructions(None))
    except EvaluationError as error:
        raise EvaluationError(f"teach.quality: {error.message}") from None


def _teach_memory(params: AllParams, sizes: ModelSizes | None) -> str:
    memory = params.teach.dtype if sizes is None else teach_memory_line(params.teach, sizes)
    return f"{params.backbone.name}, {memory}"


def _embed_text(params: AllParams, rows: int | None) -> str:
    embed = params.embed
    scaled = ", scaled to length 1" if embed.normalize else ""
    if embed.transform.kind != "none":
        scaled += f", transform {embed.transform.kind}{' and rotate' * embed.transform.rotate}"
    most = params.generate.samples_per_query * embed.teacher.max_tokens
    return f"{embed.teacher.kind}{scaled}; {_tokens(rows, most)} read{', and the queries' * embed.queries}"


def _teacher_text(params: AllParams) -> str:
    teacher = params.embed.teacher
    own = params.backbone.name if TEACHERS[teacher.kind].on_backbone else teacher.kind
    return " + ".join([teacher.name or own, *(adapter.name for adapter in teacher.adapters)])


def _train_text(params: AllParams, rows: int | None) -> str:
    train = params.train
    if rows is not None:
        steps = planned_steps(round(rows * (1 - params.collect.heldout_fraction)), train)
        count = f"about {steps:,} steps of {train.batch_size} rows"
    else:
        most = f", at most {train.stop_after_steps:,} steps" if train.stop_after_steps else ""
        count = f"{train.epochs} epochs in steps of {train.batch_size} rows{most}"
    read = train.template if train.pool == "tokens" else f"{train.template} pooled over {train.pool}"
    return f"{count}; {train.compression_tokens} compression + {train.thought_tokens} thought tokens, {read}"


def _train_memory(params: AllParams, sizes: ModelSizes | None) -> str:
    backbone = params.backbone
    memory = backbone.dtype if sizes is None else memory_line(params.train, backbone.dtype, sizes)
    return f"{backbone.name}, {memory}"


def _remarks(params: AllParams, sizes: ModelSizes | None, root: Path) -> list[str]:
    found = [_unpinned_remark(key, name, root) for key, name in _unpinned(params, root)]
    if ENGINES[params.generate.engine].stub:
        found.append(f"generate.engine: {params.generate.engine} is a stub, its answers mean nothing")
    if TEACHERS[params.embed.teacher.kind].stub:
        found.append(f"embed.teacher.kind: {params.embed.teacher.kind} is a stub, its targets mean nothing")
    found += _scale_remark(params)
    for key, folder in {"collect": params.collect.local_dir, "evaluate": params.evaluate.local_dir}.items():
        if not (root / folder).is_dir():
            found.append(f"{key}.local_dir: {folder} does not exist, `dvc repro` needs it")
    found += _missing(params, root)
    found += _unwatched(params, root)
    written, learnt = params.generate.max_new_tokens, params.train.max_response_tokens
    if written > learnt:
        found.append(f"train.max_response_tokens: {written} tokens are written, {learnt} are learnt from")
    teacher = params.embed.teacher
    copies = teacher.template.count(SLOT)
    if (needed := copies * written) > teacher.max_tokens:
        each = f"{copies} copies of an answer" if copies > 1 else "an answer"
        found.append(
            f"embed.teacher.max_tokens: {teacher.max_tokens} for {each} of up to {written} tokens: longer ones lose "
            f"their end; set {needed} and some for the template"
        )
    if sizes is None:
        found.append(f"backbone.name: no sizes known of {params.backbone.name}, so no memory estimate")
    else:
        found += memory_remarks(params.train, params.backbone.dtype, sizes)
    return found


def _unwatched(params: AllParams, root: Path) -> Iterator[str]:
    """A remark for each local source and task whose changes DVC does not see: it watches the two local_dir alone."""
    for key, (folder, name) in (_local_sources(params) | _local_tasks(params)).items():
        if not is_within(root / folder / name, root / folder):
            stage = key.split(".")[0].replace("suites", "evaluate@" + key.split(".")[1])
            yield (
                f"{key}: {name} is outside {folder}, or behind a link, and DVC does not watch it: after it changed, "
                f"run `dvc repro --single-item --force {stage}`, then `dvc repro`"
            )


def _missing(params: AllParams, root: Path) -> Iterator[str]:
    """A remark for each local source, task and probe's data that is not there, before a stage of hours needs it."""
    for key, (folder, name) in _local_sources(params).items():
        try:
            find_files(root / folder / name)
        except SourceError as error:
            yield f"{key.removesuffix('path')}{error}"
    for key, (folder, name) in (_local_tasks(params) | _quality_tasks(params) | _probe_data(params)).items():
        if not (root / folder / name).is_dir():
            yield f"{key}: there is no folder {Path(folder) / name}"


def _local_sources(params: AllParams) -> dict[str, tuple[str, str]]:
    """Folder and path of each local source, by the key of the path."""
    return {
        f"{section}.sources.{number}.path": (params.collect.local_dir, source.path)
        for section, sources in (("collect", params.collect.sources), ("teach", params.teach.sources))
        for number, source in enumerate(sources)
        if isinstance(source, LocalSource)
    }


def _local_tasks(params: AllParams) -> dict[str, tuple[str, str]]:
    """Folder and name of each local task of the suites, by its key."""
    return {
        f"suites.{suite}.local.{number}": (params.evaluate.local_dir, name)
        for suite, entry in params.suites.items()
        for number, name in enumerate(entry.local)
    }


def _quality_tasks(params: AllParams) -> dict[str, tuple[str, str]]:
    """Folder and name of each local task that a teacher trained here is measured on, by its key."""
    names = params.teach.quality.local if TEACHERS[params.embed.teacher.kind].trained_here else []
    return {f"teach.quality.local.{at}": (params.evaluate.local_dir, name) for at, name in enumerate(names)}


def _probe_data(params: AllParams) -> dict[str, tuple[str, str]]:
    """Folder and name of each local data set of the probes, by its key."""

    def below(key: str, section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        for part, value in section.items():
            if isinstance(value, Mapping):
                yield from below(f"{key}.{part}", value)
            elif part == "local" and isinstance(value, str):
                yield f"{key}.{part}", value
            elif part == "local":
                yield from ((f"{key}.{part}.{number}", name) for number, name in enumerate(value or []))

    return {key: (params.evaluate.local_dir, name) for key, name in below("probes", params.probes)}


def _scale_remark(params: AllParams) -> list[str]:
    kind, transform = params.embed.teacher.kind, params.embed.transform.kind
    if transform in UNIT_VARIANCE:
        fitting = "mean"
        reason = (
            f"dimensions of variance 1 each (embed.transform {transform}) is as large as they are many and drowns the "
            "reconstruction"
        )
    elif TEACHERS[kind].raw_norms and not params.embed.normalize:
        fitting = "mean"
        reason = f"the dimensions of {kind} targets, with norms in the hundreds, drowns the reconstruction"
    elif transform == "auto":
        return [
            f"train.align_reduction: sum fits {kind} targets if embed.transform auto leaves them, else mean: set it"
        ]
    else:
        fitting = "sum"
        reason = (
            f"the dimensions of {kind} targets, if they have length 1, leaves the alignment next to no gradient, and "
            "the reconstruction undoes a warm start"
        )
    reduction = params.train.align_reduction
    return [] if reduction == fitting else [f"train.align_reduction: {reduction} over {reason}: {fitting}"]


def _unpinned_remark(key: str, name: str, root: Path) -> str:
    if (root / name).parent.is_dir():
        return f"{key}: there is no folder {name}; if it is a name on the hub, set the commit"
    return f"{key}: {name} is not pinned: set the commit"


def _unpinned(params: AllParams, root: Path) -> list[tuple[str, str]]:
    """Key and name of each model and data set of the hub that is read at its newest commit."""
    teacher, evaluate = params.embed.teacher, params.evaluate
    used = {key: model.model_dump() for key, model in evaluate.models.items() if key in evaluate.systems}
    teach_sources = params.teach.sources if TEACHERS[teacher.kind].trained_here else []
    sections = {
        "backbone": params.backbone.model_dump(),
        "embed.teacher": teacher.model_dump(),
        "collect.sources": [source.model_dump() for source in params.collect.sources],
        "teach.sources": [source.model_dump() for source in teach_sources],
        "probes": params.probes,
        "evaluate.models": used,
    }
    pins = (pin for key, section in sections.items() for pin in _pins(key, section))
    return [(key, name) for key, name, revision in pins if revision is None and not (root / name).is_dir()]


def _pins(key: str, value: Any) -> Iterator[tuple[str, str, str | None]]:
    """Key, name and revision of each mapping below `key` that names a data set, or a model with a revision."""
    if isinstance(value, Mapping):
        name = value.get("dataset") or (value.get("name") if "revision" in value else None)
        if name:
            yield f"{key}.revision", str(name), value.get("revision")
    parts = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for part, entry in parts:
        yield from _pins(f"{key}.{part}", entry)
