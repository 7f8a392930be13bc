"""Measures the readings of the backbone that params name, on the queries and answers of the workspace."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_tokenizer, same_model
from pipeline.core.artifacts import open_artifact, read_manifest
from pipeline.core.config import Params
from pipeline.core.errors import EvaluationError, ParamsError, nested_in, section
from pipeline.core.paths import HELDOUT_TABLE, QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR, TRAIN_TABLE
from pipeline.core.run import work_dir
from pipeline.core.schemas import QUERY_EMBEDDING
from pipeline.core.target_transform import TransformParams, load_transform
from pipeline.core.vectors import matrix
from pipeline.encoder.folder.config import ResponseForm, check_form
from pipeline.encoder.passes.prompt_reader import prompt_reader
from pipeline.encoder.token_init import token_init
from pipeline.evaluate.params import EvaluateParams
from pipeline.optim.batching import epoch_order, token_budget
from pipeline.readings.measure import Line, Measurement, Rows, measure
from pipeline.readings.states import FrozenBackbone
from pipeline.readings.systems import READINGS
from pipeline.tasks.instructions import load_instructions
from pipeline.tasks.suites import SuiteParams, find_tasks, suite_tasks
from pipeline.train.data import join, usable_ids
from pipeline.train.params import RefineParams, TrainParams

log = logging.getLogger(__name__)

# Characters of texts that a kill loses at most: half a minute of a small model on a CPU.
CHUNK_CHARACTERS = {"cpu": 2**15}
LEAST_ROWS = 20


Targets = Literal["echo", "stored"]


class Inputs(Params):
    """The sections behind the readings."""

    backbone: BackboneParams
    train: TrainParams
    evaluate: EvaluateParams
    suites: dict[str, SuiteParams]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        suite: whose tasks; None: the local tasks of all suites.
        readings: keys of `READINGS`; empty: all.
        shares: of the predicted response.
        targets: of the closed form: the standardised echo reading of the answers, or those in data/targets.
        refine: the closed form too, as `train.refine` says or by its defaults.
        form: how prediction and reading are joined at a share below 1.
        rows: most training queries that are read; `heldout`: most held-out ones.
        skip: training queries that are passed over before, so that draws of one order share none.
        decorrelate, shrinkage: of `TransformParams`, for `Measurement.transform`.
        decorrelate_reading: see `Measurement`.
    """

    suite: str | None = None
    readings: Sequence[str] = ()
    shares: Sequence[float] = (0.3, 0.5, 1.0)
    targets: Targets = "echo"
    refine: bool = False
    rows: int = 4000
    heldout: int = 500
    form: ResponseForm = "beside"
    skip: int = 0
    decorrelate: float = 0.0
    shrinkage: float | Literal["auto"] = "auto"
    decorrelate_reading: bool = False


@dataclass(frozen=True)
class Found:
    """What was measured, and on what."""

    backbone: Mapping[str, str]
    tasks: Sequence[str]
    targets: Targets
    rows: int
    heldout: int
    answered: bool
    lines: Sequence[Line]


def run(inputs: Inputs, request: Request) -> Found:
    """Measure the readings of the params' backbone.

    Raises:
        ParamsError: a suite, reading or share does not exist.
        ArtifactError: there are no collected queries, or an artifact is damaged.
        EvaluationError: a task or its data is missing, or there are too few queries.
        BackboneError: the backbone cannot be loaded.
    """
    names = _checked(request)
    identity = identify(inputs.backbone.name, inputs.backbone.revision)
    if request.targets == "stored":
        _check_form(request.form, identity)
    tasks = _tasks(inputs, request.suite)
    train, heldout = (
        _rows(table, chosen, inputs.train.seed, request, identity)
        for table, chosen in (
            (TRAIN_TABLE, slice(request.skip, request.skip + request.rows)),
            (HELDOUT_TABLE, slice(request.heldout)),
        )
    )
    if len(train.queries) < LEAST_ROWS:
        left = f" after --skip {request.skip}" if request.skip else ""
        raise EvaluationError(f"{len(train.queries)} training queries{left}, at least {LEAST_ROWS}: collect more")
    if not train.answers:
        log.warning("%s is not there: no closed form, no query to answer; run generate for both", RESPONSES_DIR)
    if inputs.train.too_long == "keep_end":
        log.warning("train.too_long keep_end: readings keep the start of a longer text, the student its end")
    backbone, device = frozen_backbone(inputs), best_device()
    settings = Measurement(
        tasks=tasks,
        instructions=load_instructions(Path(own) if (own := inputs.evaluate.instructions) else None),
        shares=request.shares,
        bootstrap=inputs.evaluate.bootstrap,
        dtype=inputs.evaluate.dtype,
        hidden_dir=work_dir("hidden"),
        tasks_dir=work_dir("readings"),
        chunk_characters=CHUNK_CHARACTERS.get(device),
        refine=(inputs.train.refine or RefineParams()) if request.refine else None,
        form=request.form,
        transform=TransformParams(kind="standardize", decorrelate=request.decorrelate, shrinkage=request.shrinkage),
        decorrelate_reading=request.decorrelate_reading,
        seed=inputs.train.seed,
        device=device,
    )
    lines = measure(backbone, names, train, heldout, settings)
    task_names = [task.metadata.name for task in tasks]
    counts = len(train.queries), len(heldout.queries), bool(train.answers)
    return Found(identity, task_names, request.targets, *counts, lines)


def _checked(request: Request) -> list[str]:
    if unknown := [name for name in request.readings if name not in READINGS]:
        raise ParamsError(
            f"there is no reading {', '.join(unknown)} (there are: {', '.join(READINGS)})", argument="reading"
        )
    if wrong := [share for share in request.shares if not 0 < share <= 1]:
        raise ParamsError(f"{wrong[0]:g} must be above 0 and at most 1", argument="share")
    if request.decorrelate and request.targets == "stored":
        raise ParamsError("stored targets are as embed.transform made them: leave it at 0", argument="decorrelate")
    if request.shrinkage != "auto" and not request.decorrelate:
        raise ParamsError(f"{request.shrinkage:g} needs --decorrelate", argument="shrinkage")
    if request.decorrelate_reading and request.form == "added" and not request.decorrelate:
        raise ParamsError("of the form added it needs --decorrelate", argument="decorrelate_reading")
    return [name for name in READINGS if not request.readings or name in request.readings]


def _tasks(inputs: Inputs, suite: str | None) -> list[Any]:
    """The tasks of a suite, or the local ones of all, each once."""
    folder = Path(inputs.evaluate.local_dir)
    if suite is None:
        names = dict.fromkeys(name for params in inputs.suites.values() for name in params.local)
        if not names:
            log.warning("no suite names a local task, so no task is scored: name a suite for the tasks of mteb")
        return find_tasks([folder / name for name in names])
    if suite not in inputs.suites:
        raise ParamsError(f"there is no suite {suite} (there are: {', '.join(inputs.suites)})", argument="suite")
    return suite_tasks(inputs.suites, suite, folder)


def _check_form(form: ResponseForm, backbone: Mapping[str, str]) -> None:
    """Raises TrainingError if predictions in the space of data/targets cannot be added to readings of the backbone."""
    made, transform = read_manifest(TARGETS_DIR).manifest, load_transform(TARGETS_DIR)
    kind, mapped = transform.identity if transform else None, made.params.get("queries", False)
    teacher = made.models["teacher"]
    with nested_in(names={"response_form": "form"}):
        check_form(form, teacher, kind if same_model(teacher, backbone) else None, mapped=mapped)


def _rows(table: str, drawn: slice, seed: int, request: Request, backbone: Mapping[str, str]) -> Rows:
    """These of the queries of a table in random order, with their usable answers where there are any."""
    queries = open_artifact(QUERIES_DIR, QUERIES_DIR.name).read(table)
    if not queries.num_rows:
        return Rows([], [])
    responses = _responses(request.targets, backbone)
    if responses is not None and request.targets == "stored":
        columns = None if request.form == "added" else ["id", "embedding"]
        queries = join(queries, responses, open_artifact(TARGETS_DIR, TARGETS_DIR.name).read(columns=columns))
    elif responses is not None:
        queries = queries.filter(pc.is_in(queries["id"], usable_ids(responses)))
    chosen = queries.take(pa.array(np.sort(epoch_order(queries.num_rows, 0, seed)[drawn])))
    texts = chosen["text"].to_pylist()
    if responses is None:
        return Rows(texts, [])
    found = responses["response"].take(pc.index_in(chosen["id"], responses["id"].combine_chunks()))
    vectors = (matrix(chosen[name]) for name in ("embedding", QUERY_EMBEDDING) if name in chosen.column_names)
    return Rows(texts, found.to_pylist(), *vectors)


def _responses(targets: Targets, backbone: Mapping[str, str]) -> pa.Table | None:
    """The backbone's answers; None where there are none, and no target of them is asked for."""
    if targets == "echo" and not RESPONSES_DIR.exists():
        return None
    found = open_artifact(RESPONSES_DIR, RESPONSES_DIR.name)
    wrote = found.manifest.models.get("backbone", backbone)
    if not same_model(wrote, backbone):
        raise EvaluationError(f"{RESPONSES_DIR} was written by {wrote}, the backbone is {backbone}: run generate again")
    return found.read()


def frozen_backbone(inputs: Inputs) -> FrozenBackbone:
    """The params' backbone on the best device, to be read as their student does before its first step."""
    params, train, device = inputs.backbone, inputs.train, best_device()
    dtype = inputs.evaluate.dtype
    log.info("backbone: device %s (the best present), %s", device, dtype)
    model, tokenizer = load_backbone(params.model_copy(update={"dtype": dtype}), device), load_tokenizer(params)
    with section("train"), nested_in("token_start"):
        start = token_init(train.token_start.kind, train.token_start.words, tokenizer)
    return FrozenBackbone(
        model=model,
        tokenizer=tokenizer,
        reader=prompt_reader(model),
        new_tokens=start(model.get_input_embeddings(), train.thought_tokens + train.compression_tokens, train.seed),
        read=train.compression_tokens,
        template=train.template,
        chat_template_kwargs=params.chat_template_kwargs,
        max_tokens=train.max_query_tokens // (2 if train.template == "echo" else 1),
        batch_tokens=token_budget(inputs.evaluate.batch_tokens, device),
        identity={**identify(params.name, params.revision), "dtype": dtype},
    )
