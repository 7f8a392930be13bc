"""Time and disk of each stage on one GPU, on paper, for `python -m pipeline params`.

Upper bounds for rows of full length; texts of mteb's tasks have the mean length that mteb states. Training and reading
take their operations (`pipeline.optim.flops`) at `COMPUTE_SHARE` of the data sheet's. A step of decoding reads the
weights, and the keys and values of all rows in flight, at `BANDWIDTH_SHARE`; as many rows are in flight as vLLM takes
and the cache holds. Both shares are assumptions: `bench/gpu.py` measures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.backbone.loading import DTYPE_BYTES, BackboneParams, DType
from pipeline.backbone.prompting import SLOT
from pipeline.backbone.sizes import ModelSizes
from pipeline.cli.plan import GB, AllParams, backbone_sizes, expected_rows, model_config
from pipeline.core.errors import nested_in, section
from pipeline.core.schemas import TARGET_TYPES
from pipeline.embed.teachers.registry import TEACHERS
from pipeline.embed.teachers.template import TEMPLATES
from pipeline.encoder.folder.config import embedding_width
from pipeline.evaluate.plan import EvaluationPlan, SuiteSize
from pipeline.evaluate.registry import BUILT_IN, SystemEntry
from pipeline.generate.engines.vllm_defaults import (
    GPU_SEQUENCES,
    GPU_UTILIZATION,
    SMALL_GPU_BYTES,
    SMALL_GPU_SEQUENCES,
)
from pipeline.generate.generator import BYTES_PER_ROW, BYTES_PER_TOKEN
from pipeline.optim.flops import read_flops, step_flops
from pipeline.optim.gpus import GPUS, Gpu
from pipeline.optim.memory import TRAINED, adapter_parameters, kv_bytes, trained_parameters
from pipeline.teach.plan import phase_flops
from pipeline.train.params import planned_steps
from pipeline.train.plan import step_settings

COMPUTE_SHARE = 0.4
BANDWIDTH_SHARE = 0.6
FLOAT32 = 4
TOKEN = 4  # bytes of a token of a training row on the disk, see `pipeline.train.row_files`
STEPS, CLOSED_FORM = "steps", "closed form"


@dataclass(frozen=True)
class Cost:
    """Of one stage: seconds on one GPU and bytes of disk, None where unknown.

    `parts` has the seconds of each system, and of the steps and the closed forms of a training.
    """

    stage: str
    seconds: float | None
    disk: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)


def make_costs(params: AllParams, gpu: Gpu | None, root: Path = Path()) -> list[Cost]:
    """What each stage costs with these params, those first that run first; without a GPU no times.

    Raises as `plan.make_plan`.
    """
    teacher, own = params.embed.teacher, backbone_sizes(params.backbone, root)
    sizes = own
    with section("embed"), nested_in("teacher"):
        if not TEACHERS[teacher.kind].on_backbone:
            sizes = None
        elif teacher.name:
            sizes = backbone_sizes(BackboneParams(name=teacher.name, revision=teacher.revision), root)
        width = sizes.hidden if sizes else _local_width(root / teacher.name) if teacher.name else None
    rows, _ = expected_rows(params, root)
    evaluation = EvaluationPlan(params.evaluate, params.suites, params.probes, root)
    return CostModel(params, own, sizes, width, rows, gpu).stages(evaluation)


def _local_width(folder: Path) -> int | None:
    """Width of the embeddings of a sentence-transformers folder whose modules keep the transformer's."""
    config = folder / "config.json"
    found = model_config(config).get("hidden_size") if config.is_file() else None
    return found if isinstance(found, int) else None


@dataclass(frozen=True)
class CostModel:
    """Costs by the params.

    Attributes:
        sizes: of the backbone; None: unknown.
        teacher: sizes of the teacher's model; None: unknown.
        teacher_width: of its embeddings; None: unknown.
        rows: the most queries that there will be; None: no bound.
        gpu: None: no times.
    """

    params: AllParams
    sizes: ModelSizes | None
    teacher: ModelSizes | None
    teacher_width: int | None
    rows: int | None
    gpu: Gpu | None

    def stages(self, evaluation: EvaluationPlan) -> list[Cost]:
        """The stages that have an estimate, in their order."""
        found = [Cost("models", None, self._weights()), self._generate()]
        if TEACHERS[self.params.embed.teacher.kind].trained_here:
            found.append(self._teach())
        found += [self._embed(), self._train()]
        read = evaluation.sizes(self.params.train.max_query_tokens)
        by_teacher = evaluation.sizes(self.params.embed.teacher.max_tokens)
        return found + [self._evaluate(stage, size, by_teacher[stage]) for stage, size in read.items()]

    @property
    def _answers(self) -> int | None:
        """To all queries."""
        return None if self.rows is None else self.rows * self.params.generate.samples_per_query

    @property
    def _trained_width(self) -> int | None:
        """Of the targets, and of the systems in their space."""
        transform = self.params.embed.transform
        return transform.components if transform.kind == "whiten" and transform.components else self.teacher_width

    @property
    def _target_bytes(self) -> int:
        """Of a row in data/targets; 0 where the width is unknown."""
        number = TARGET_TYPES[self.params.embed.dtype].bit_width // 8
        return (self._trained_width or 0) * number * (2 if self.params.embed.queries else 1)

    # --- stages -----------------------------------------------------------------------------------------------------

    def _weights(self) -> float | None:
        """Bytes of the checkpoints, two a number; a teacher on the backbone has the same one."""
        if self.sizes is None:
            return None
        own = TEACHERS[self.params.embed.teacher.kind].on_backbone and self.teacher == self.sizes
        other = 0 if own or self.teacher is None else self.teacher.parameters()
        return 2.0 * (self.sizes.parameters() + other)

    def _generate(self) -> Cost:
        generate, rows = self.params.generate, self._answers
        if rows is None:
            return Cost("generate", None, None)
        disk = 2 * rows * (BYTES_PER_ROW + BYTES_PER_TOKEN * generate.max_new_tokens)
        return Cost("generate", self._answer_seconds(rows, generate.max_prompt_tokens, generate.max_new_tokens), disk)

    def _teach(self) -> Cost:
        if self.sizes is None:
            return Cost("teach", None, None)
        flops = sum(phase_flops(phase, self.sizes) for phase in (self.params.teach.mntp, self.params.teach.simcse))
        return Cost("teach", self._compute_seconds(flops), None)

    def _embed(self) -> Cost:
        embed, rows, targets = self.params.embed, self._answers, self.rows
        if rows is None or targets is None:
            return Cost("embed", None, None)
        queries = targets if embed.queries else 0
        texts = rows + queries
        seconds = self._read_seconds(self.teacher, texts * embed.teacher.max_tokens, embed.teacher.max_tokens)
        if self.teacher_width is None or self._trained_width is None:
            return Cost("embed", seconds, None)
        # The work folder keeps the teacher's own vectors, in float32.
        number = TARGET_TYPES[embed.dtype].bit_width // 8
        made = (targets + queries) * self._trained_width * number
        return Cost("embed", seconds, texts * self.teacher_width * FLOAT32 + made)

    def _train(self) -> Cost:
        train, sizes = self.params.train, self.sizes
        if self.rows is None or sizes is None:
            return Cost("train", None, None)
        rows = round(self.rows * (1 - self.params.collect.heldout_fraction))
        settings = replace(step_settings(train, self.params.backbone.dtype), width=self._trained_width)
        row = step_flops(
            sizes,
            [(train.max_query_tokens, train.max_response_tokens)],
            compression_tokens=train.compression_tokens,
            thought_tokens=train.thought_tokens,
            width=self._trained_width,
            adapter_parameters=adapter_parameters(sizes, settings),
        )
        steps = float(row) * planned_steps(rows, train) * train.batch_size
        read = train.max_query_tokens + settings.new_tokens
        passes = train.warm_start.enabled + train.refit_alignment
        closed = passes * min(rows, train.warm_start.rows or rows)
        fitted = read_flops(sizes, closed * read, read)
        parts = {STEPS: self._compute_seconds(steps), CLOSED_FORM: self._compute_seconds(fitted)} if passes else {}
        # The encoder's tensors in float32, and a checkpoint of them with gradients' moments. In the work folder the
        # hidden states of the rows of a closed form, and while the stage runs the tokens and targets of all rows.
        disk = TRAINED * trained_parameters(sizes, settings) + closed * sizes.hidden * FLOAT32
        disk += self.rows * (TOKEN * (train.max_query_tokens + train.max_response_tokens) + self._target_bytes)
        return Cost("train", self._compute_seconds(steps + fitted), disk, parts)

    def _evaluate(self, stage: str, size: SuiteSize, by_teacher: SuiteSize) -> Cost:
        evaluate = self.params.evaluate
        seconds: dict[str, float | None] = {}
        width = 0
        kept: set[tuple[object, ...]] = set()
        for name in evaluate.systems:
            entry = BUILT_IN.get(name)
            if entry is None:
                seconds[name] = None
                continue
            passes = 0 if entry.embeddings in kept else len(evaluate.seeds) if entry.per_seed else 1
            one = self._system_seconds(entry, size, by_teacher)
            seconds[name] = None if one is None else one * passes
            width += passes * (self._width(entry) or 0)
            if evaluate.cache_embeddings:
                kept.add(entry.embeddings)
        known = [each for each in seconds.values() if each is not None]
        number = TARGET_TYPES[evaluate.embeddings_dtype].bit_width // 8
        disk = width * size.texts * number if evaluate.cache_embeddings else 0
        return Cost(stage, sum(known) if known else None, disk, seconds)

    # --- systems ----------------------------------------------------------------------------------------------------

    def _system_seconds(self, entry: SystemEntry, size: SuiteSize, by_teacher: SuiteSize) -> float | None:
        new = self.params.train.compression_tokens + self.params.train.thought_tokens
        match entry.kind:
            case "encoder" | "start":
                copies = 2 if self.params.train.template == "echo" else 1
                return self._texts_seconds(self.sizes, copies * size.tokens + size.texts * new, size.texts)
            case "pooling":
                return self._texts_seconds(self.sizes, size.tokens * TEMPLATES[entry.template].count(SLOT), size.texts)
            case "teacher":
                return self._texts_seconds(self.teacher, by_teacher.tokens, by_teacher.texts)
            case "hyde":
                return self._hyde_seconds(by_teacher)

    def _hyde_seconds(self, size: SuiteSize) -> float | None:
        generate = self.params.generate
        written = self.params.evaluate.answers.max_new_tokens or generate.max_new_tokens
        query = (size.tokens - size.document_tokens) / max(1, size.queries)
        answering = self._answer_seconds(size.queries, round(query), written)
        answers = size.queries * min(written, self.params.embed.teacher.max_tokens)
        reading = self._texts_seconds(self.teacher, size.document_tokens + answers, size.texts)
        return None if answering is None or reading is None else answering + reading

    def _width(self, entry: SystemEntry) -> int | None:
        """Of a system's embeddings."""
        hidden, trained = self.sizes.hidden if self.sizes else None, self._trained_width
        if not entry.teacher_space:
            return hidden
        if entry.per_seed or entry.kind not in ("encoder", "start") or hidden is None or trained is None:
            return trained
        train = self.params.train
        return embedding_width(train.response_share, trained, hidden, train.response_form)

    # --- seconds ----------------------------------------------------------------------------------------------------

    def _compute_seconds(self, flops: float) -> float | None:
        return None if self.gpu is None else flops / (self.gpu.flops * COMPUTE_SHARE)

    def _texts_seconds(self, sizes: ModelSizes | None, tokens: float, texts: int) -> float | None:
        return self._read_seconds(sizes, tokens, tokens / max(1, texts))

    def _read_seconds(self, sizes: ModelSizes | None, tokens: float, length: float) -> float | None:
        return None if sizes is None else self._compute_seconds(read_flops(sizes, tokens, length))

    def _answer_seconds(self, rows: int, prompt: int, written: int) -> float | None:
        """Seconds to write `written` tokens behind each of `rows` prompts; None too where the weights do not fit."""
        if self.sizes is None or self.gpu is None:
            return None
        return answer_seconds(self.sizes, self.gpu, self.params.generate.dtype, rows, prompt, written)


def answer_seconds(sizes: ModelSizes, gpu: Gpu, dtype: DType, rows: int, prompt: int, written: int) -> float | None:
    """Seconds to write `written` tokens behind each of `rows` prompts of `prompt` tokens; None: it does not fit."""
    weights, token = sizes.parameters() * DTYPE_BYTES[dtype], kv_bytes(sizes, dtype)
    fitting = int((GPU_UTILIZATION * gpu.memory - weights) / (token * (prompt + written)))
    if fitting < 1:
        return None
    together = min(fitting, GPU_SEQUENCES if gpu.memory >= SMALL_GPU_BYTES else SMALL_GPU_SEQUENCES, max(1, rows))
    # A row is on average half written.
    moved = (weights + together * token * (prompt + written / 2)) / (gpu.bandwidth * BANDWIDTH_SHARE)
    computed = together * 2 * sizes.parameters() / (gpu.flops * COMPUTE_SHARE)
    reading = rows * read_flops(sizes, prompt, prompt) / (gpu.flops * COMPUTE_SHARE)
    return reading + rows / together * written * max(moved, computed)


# --- text -----------------------------------------------------------------------------------------------------------


def cost_lines(costs: Sequence[Cost], gpu: Gpu | None) -> list[str]:
    """The costs for people: a heading that names the assumptions, a line for each stage, the sums."""
    return [*_heading(gpu), *cost_table(costs)]


def cost_table(costs: Sequence[Cost]) -> list[str]:
    """A line for each stage, with the time of its parts where there are some; the sums; what is left out."""
    lines: list[str] = []
    for cost in costs:
        lines.append(f"  {cost.stage:<22} {time_text(cost.seconds):>8}  {_disk(cost.disk):>9}")
        if any(seconds is not None for seconds in cost.parts.values()):
            shares = (f"{name} {time_text(seconds)}" for name, seconds in cost.parts.items())
            lines.append(f"    of it {', '.join(shares)}")
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    disk = sum(cost.disk or 0 for cost in costs)
    lines.append(f"  {'together':<22} {time_text(sum(seconds) if seconds else None):>8}  {_disk(disk):>9}")
    return [
        *lines,
        "-: not known. Not estimated: collect, report, local tasks, other probes, examples of classifications.",
    ]


def _heading(gpu: Gpu | None) -> list[str]:
    if gpu is None:
        names = ", ".join(GPUS)
        return [
            f"Disk by stage, computed and not measured. There is no known GPU here: --gpu NAME adds times ({names})."
        ]
    sheet = f"{gpu.flops / 1e12:g} TFLOP/s in bfloat16, {gpu.bandwidth / 1e12:g} TB/s, {gpu.memory / 1e9:.0f} GB"
    return [
        f"Time and disk by stage on one {gpu.name}, computed and not measured ({sheet}: {gpu.source}), at "
        f"{COMPUTE_SHARE:.0%} of its operations and {BANDWIDTH_SHARE:.0%} of its bandwidth; more GPUs divide the time.",
    ]


def time_text(seconds: float | None) -> str:
    """Seconds in the largest unit of which there is one; - where unknown."""
    if seconds is None:
        return "-"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _disk(size: float | None) -> str:
    return "-" if size is None else f"{size / GB:.1f} GB"
