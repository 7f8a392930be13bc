"""Which settings are worth having: closed-form starts and gradient steps on real data, SmolLM2-135M.

    .venv/bin/python bench/study.py [--workspace DIR] [--part start projections tokens joint] [--cache DIR] [--sts FILE]

The workspace is a folder in which the stages collect, generate and embed have run; where they have not, they do so
first. That takes half an hour on two cores, the whole study hours. Every setting is judged on the held-out rows (cosine
to the own target; top-1 and MRR of the own target among all held-out ones) and by STSBenchmark (Spearman of the pairs'
cosines, which is mteb's main score). Hidden states are kept in the cache: the second call reads them. One process, as
many threads as OMP_NUM_THREADS.

start        the closed form, no gradient: template, tokens, thought tokens, token starts, ridge, rows, targets
projections  alignment alone, tokens fixed, so hidden states are read and thousands of steps take seconds: rates,
             closed form against random start
tokens       alignment alone through the backbone: rates of the tokens, and the closed form solved again afterwards
joint        both losses: weights, closed form against random start
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from bench.common import REAL_DATA, ROOT, prepare_models, show
from bench.training_study.data import (
    WORDS,
    HiddenStates,
    Pairs,
    Scores,
    cached,
    load_backbone_and_tokenizer,
    read_pairs,
    read_part,
    score,
    score_with_sts,
)
from bench.training_study.steps import (
    Rates,
    alignment_loss,
    cross_entropies,
    descend,
    joint_loss,
    projection_loss,
    response_ids,
)
from bench.training_study.workspace import prepare_workspace

STS = REAL_DATA / "hub/mteb/stsbenchmark-sts/data/test.parquet"
STRENGTHS = (1.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0)
PROJECTION_RUNS = (
    *(("closed form", Rates(rate)) for rate in (1e-5, 1e-4, 1e-3)),
    ("closed form", Rates(1e-6, falling=True)),
    *(("random", Rates(rate)) for rate in (1e-4, 3e-4, 1e-3, 3e-3)),
    *(("random", Rates(rate, falling=True)) for rate in (3e-4, 1e-3)),
)
TOKEN_RUNS = (
    ("closed form", Rates(1e-5, 1e-3)),
    ("closed form", Rates(1e-5, 3e-3)),
    ("closed form", Rates(1e-5, 1e-2)),
    ("random", Rates(3e-4, 3e-4)),
)
JOINT_RUNS = (
    ("closed form, summed error x 1/384 (its mean)", Rates(1e-5, 3e-3), 1 / 384, True),
    ("closed form, summed error x 1", Rates(1e-5, 3e-3), 1.0, True),
    ("closed form, summed error x 10", Rates(1e-5, 3e-3), 10.0, True),
    ("random, mean error, 3e-4 (the paper's)", Rates(3e-4, 3e-4), 1 / 384, False),
    ("random, summed error, 1e-3", Rates(1e-3, 1e-3), 1.0, False),
)
Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A closed-form start.

    Attributes:
        name: in the table.
        template: of the query.
        start: of the token rows.
        count: new tokens of the pass that is kept; the first `thought + tokens` of them play a part.
        thought: tokens before those that are read.
        tokens: that are read.
        seed: of the draw of rows.
        every: takes each so manieth training row.
        strength: of the ridge.
    """

    name: str
    template: str = "chat"
    start: str = "vocabulary"
    count: int = 20
    thought: int = 0
    tokens: int = 10
    seed: int = 0
    every: int = 1
    strength: float | str = "auto"

    @property
    def read(self) -> slice:
        """Where the tokens that are read stand among the new ones."""
        return slice(self.thought, self.thought + self.tokens)


BASE = Setting("chat, 10 tokens, vocabulary rows")
HALF = replace(BASE, name="the same from half the rows", every=2)
LAYOUTS = (
    BASE,
    *(replace(BASE, name=f"{n} tokens", tokens=n) for n in (1, 5, 20)),
    *(replace(BASE, name=f"10 thought + {n} tokens", thought=10, tokens=n) for n in (1, 10)),
    replace(BASE, name="raw template", template="raw", count=10),
)
STARTS = (
    HALF,
    replace(HALF, name="another draw of vocabulary rows", count=10, seed=1),
    replace(HALF, name="normal", start="random", count=10),
    replace(HALF, name="mean row, all alike", start="mean", count=10),
    replace(HALF, name=f'words "{WORDS}"', start="words", count=10),
)


class Study:
    """Data, model and caches of one run."""

    def __init__(self, workspace: Path, cache: Path, sts: Path) -> None:
        """Reads everything; the backbone is loaded."""
        from pipeline.encoder.student import input_embeddings

        self.train, self.heldout = read_part(workspace, "train"), read_part(workspace, "heldout")
        self.pairs: Pairs = read_pairs(sts)
        backbone, tokenizer = load_backbone_and_tokenizer()
        self.states, self.cache = HiddenStates(backbone, tokenizer, cache), cache
        self.words = input_embeddings(backbone).float().numpy()
        self.norm = float(np.linalg.norm(self.words, axis=1).mean())

    def hidden(self, setting: Setting, part: str, every: int = 1) -> np.ndarray:
        """`[N, n, d]` of train, heldout or sts."""
        texts = {"train": self.train.queries, "heldout": self.heldout.queries, "sts": self.pairs.sentences}[part]
        name = part if every == 1 else f"{part}-{every}"
        key = setting.template, setting.start, setting.count, setting.seed
        return np.asarray(self.states(name, texts[::every], *key)[:, setting.read])

    def training_hidden(self, setting: Setting) -> np.ndarray:
        """Of the training rows that the setting takes; half of a whole pass is read from it."""
        if setting.every > 1 and setting.start == "vocabulary" and setting.seed == 0:
            return self.hidden(setting, "train")[:: setting.every]
        return self.hidden(setting, "train", setting.every)

    def student(self, setting: Setting, width: int) -> Any:
        """With the token rows of the setting that are run (thought tokens included) and random projections."""
        import torch

        from pipeline.encoder.student import Student

        torch.manual_seed(0)
        student = Student(self.words.shape[1], width, setting.tokens, setting.thought)
        with torch.no_grad():
            student.tokens.copy_(self.states.rows(setting.start, setting.count, setting.seed)[: setting.read.stop])
        return student

    def fit(self, setting: Setting, hidden: np.ndarray, targets: np.ndarray) -> tuple[Any, float]:
        """A student with the closed form of these rows, and the strength it took."""
        from pipeline.train.states import States
        from pipeline.train.warm_start import Statistics, frame_rows, warm_start

        student = self.student(setting, targets.shape[1])
        statistics = Statistics(student.compression_tokens, student.hidden)
        for start in range(0, len(hidden), 1024):
            rows = range(start, min(start + 1024, len(hidden)))
            states = States.of(hidden[start : rows.stop], student.compression_tokens)
            statistics.add(rows, states, targets[start : rows.stop])
        [prompt] = self.states.prompts(setting.template, [""])
        frame = frame_rows(self.words, prompt, student.compression_tokens)
        return student, warm_start(student, statistics, frame, self.norm, setting.strength)  # type: ignore[arg-type]

    def judge(self, student: Any, setting: Setting, targets: np.ndarray | None = None) -> Scores:
        """Held-out rows and STS with the tokens the setting started with."""
        sides = (embed(student, self.hidden(setting, part)) for part in ("heldout", "sts"))
        heldout, sentences = sides
        return score_with_sts(heldout, self.heldout.targets if targets is None else targets, sentences, self.pairs)


def embed(student: Any, hidden: np.ndarray) -> np.ndarray:
    """Embeddings `[N, e]` of hidden states `[N, n, d]`."""
    import torch

    with torch.inference_mode():
        return np.asarray(student.embedding(student.soft_prompts(torch.from_numpy(np.array(hidden)))))


def closed_forms(study: Study, settings: tuple[Setting, ...]) -> list[Line]:
    """One line a setting; differences are from the first."""
    lines, base = [], None
    for setting in settings:
        student, used = study.fit(setting, study.training_hidden(setting), study.train.targets[:: setting.every])
        scores = study.judge(student, setting)
        base = base or scores
        lines.append({"setting": setting.name, **scores.line(), **scores.beside(base), "ridge": used})
        print(lines[-1], file=sys.stderr)
    return lines


def by_rows(study: Study) -> list[Line]:
    """The base from fewer rows."""
    lines = []
    for every in (32, 16, 8, 4, 2, 1):
        setting = replace(BASE, every=every)
        hidden = study.training_hidden(setting)
        student, used = study.fit(setting, hidden, study.train.targets[::every])
        lines.append({"setting": f"{len(hidden)} rows", **study.judge(student, setting).line(), "ridge": used})
    return lines


def by_targets(study: Study) -> list[Line]:
    """What the base learns from targets of other kinds; each is judged by held-out targets of its own kind."""
    lines = []
    for name, (train, heldout) in target_kinds(study).items():
        student, used = study.fit(HALF, study.training_hidden(HALF), train)
        norm = round(float(np.linalg.norm(train, axis=1).mean()), 2)
        lines.append({"setting": name, "norm": norm, **study.judge(student, HALF, heldout).line(), "ridge": used})
    return lines


def target_kinds(study: Study) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Targets of half the training rows and of the held-out rows, by name."""
    responses = {"train-2": study.train.responses[:: HALF.every], "heldout": study.heldout.responses}
    pooled = [backbone_targets(study, name, texts) for name, texts in responses.items()]
    plain = study.train.targets[:: HALF.every], study.heldout.targets
    kinds = {"all-MiniLM-L6-v2": plain, "backbone, mean of last hidden states": tuple(pooled)}
    result = {}
    for name, (train, heldout) in kinds.items():
        mean = train.mean(0)
        result[name] = train, heldout
        result[f"{name}, unit length"] = unit(train), unit(heldout)
        result[f"{name}, centred"] = train - mean, heldout - mean
        result[f"{name}, centred, unit length"] = unit(train - mean), unit(heldout - mean)
    del result["all-MiniLM-L6-v2, unit length"]
    return result


def backbone_targets(study: Study, name: str, texts: list[str]) -> np.ndarray:
    """Mean-pooled last hidden states of texts."""
    from pipeline.embed.teachers.pooling import PooledTeacher
    from pipeline.embed.teachers.template import TemplateTokenizer

    def compute() -> np.ndarray:
        tokenizer = TemplateTokenizer(study.states.tokenizer, max_tokens=256)
        teacher = PooledTeacher(study.states.backbone.get_decoder(), tokenizer, identity={})
        return teacher.embed(texts)

    return cached(study.cache, f"targets-backbone-{name}", compute)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def projection_steps(study: Study, steps: int) -> list[Line]:
    """Rates of the projections from both starts, 32 rows a step, tokens fixed."""
    hidden, targets = study.training_hidden(BASE), study.train.targets
    heldout = study.hidden(BASE, "heldout")
    checkpoints = sorted({step for step in (50, 100, 200, 500, 1000, 2000, 5000) if step < steps} | {steps})
    lines: list[Line] = []
    for start, rates in PROJECTION_RUNS:
        warm = start == "closed form"
        student = study.fit(BASE, hidden, targets)[0] if warm else study.student(BASE, targets.shape[1])
        name = f"{start}, {rates.projections:g}{', falling' if rates.falling else ''}"

        def look(step: int, student: Any = student, name: str = name) -> None:
            scores = score(embed(student, heldout), study.heldout.targets)
            lines.append({"setting": name, "step": step, **scores.line()})

        loss = projection_loss(student, hidden, targets)
        descend(student, loss, rates, rows=len(hidden), batch_size=32, checkpoints=checkpoints, look=look)
        lines[-1] |= study.judge(student, BASE).line()
    return lines


def token_steps(study: Study, steps: int) -> list[Line]:
    """Rates of the tokens, 16 rows a step; at the end the closed form again, on hidden states of the new tokens."""
    hidden, targets = study.training_hidden(BASE), study.train.targets
    prompts = {part.name: study.states.prompts("chat", part.queries) for part in (study.train, study.heldout)}
    lines: list[Line] = []
    for start, rates in TOKEN_RUNS:
        warm = start == "closed form"
        student = study.fit(BASE, hidden, targets)[0] if warm else study.student(BASE, targets.shape[1])
        name = f"{start}, projections {rates.projections:g}, tokens {rates.tokens:g}"

        def look(step: int, student: Any = student, name: str = name) -> None:
            after = study.states.compute(prompts["heldout"], student.tokens.detach())
            lines.append({"setting": name, "step": step, **score(embed(student, after), study.heldout.targets).line()})
            print(lines[-1], file=sys.stderr)

        loss = alignment_loss(student, study.states.passes, prompts["train"], targets)
        points = [steps // 2, steps]
        descend(student, loss, rates, rows=len(hidden), batch_size=16, checkpoints=points, look=look)
        lines.append({"setting": f"{name}, solved again", "step": steps, **solved_again(study, student, prompts)})
        print(lines[-1], file=sys.stderr)
    return lines


def solved_again(study: Study, student: Any, prompts: Mapping[str, Any]) -> Line:
    """The closed form on half the training rows with the tokens as they are now; compare with the base of half."""
    tokens = student.tokens.detach()
    hidden = study.states.compute(prompts["train"][:: HALF.every], tokens)
    fitted, _ = study.fit(HALF, hidden, study.train.targets[:: HALF.every])
    heldout = study.states.compute(prompts["heldout"], tokens)
    return score(embed(fitted, heldout), study.heldout.targets).line()


def joint_steps(study: Study, steps: int) -> list[Line]:
    """Both losses, 16 rows a step: weights of the alignment from the closed form, and the paper's start."""
    hidden, targets = study.training_hidden(BASE), study.train.targets
    prompts = {part.name: study.states.prompts("chat", part.queries) for part in (study.train, study.heldout)}
    responses = {part.name: response_ids(study.states, part) for part in (study.train, study.heldout)}
    lines: list[Line] = []
    for name, rates, weight, warm in JOINT_RUNS:
        student = study.fit(BASE, hidden, targets)[0] if warm else study.student(BASE, targets.shape[1])

        def look(step: int, student: Any = student, name: str = name) -> None:
            after = study.states.compute(prompts["heldout"], student.tokens.detach())
            own, other = cross_entropies(student, study.states.passes, after, responses["heldout"])
            scores = score(embed(student, after), study.heldout.targets).line()
            lines.append(
                {"setting": name, "step": step, **scores, "CE own": round(own, 3), "CE other": round(other, 3)}
            )
            print(lines[-1], file=sys.stderr)

        loss = joint_loss(student, study.states.passes, prompts["train"], responses["train"], targets, weight)
        descend(student, loss, rates, rows=len(hidden), batch_size=16, checkpoints=[steps], look=look)
    return lines


def tables(study: Study, part: str, steps: int) -> Iterator[tuple[str, list[Line]]]:
    """Titles and lines of a part."""
    match part:
        case "start":
            yield "closed form", closed_forms(study, LAYOUTS)
            yield "token starts, half the training rows", closed_forms(study, STARTS)
            strengths = tuple(replace(BASE, name=f"ridge {value:g}", strength=value) for value in STRENGTHS)
            yield "ridge strength", closed_forms(study, (BASE, *strengths))
            yield "training rows", by_rows(study)
            yield "targets, half the training rows", by_targets(study)
        case "projections":
            yield "alignment alone, tokens fixed", projection_steps(study, steps or 5000)
        case "tokens":
            yield "alignment alone, tokens too", token_steps(study, steps or 100)
        case "joint":
            yield "both losses", joint_steps(study, steps or 30)


def main() -> None:
    """Run the parts and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=ROOT / ".bench" / "study")
    parser.add_argument("--part", nargs="+", default=["start", "projections", "tokens", "joint"])
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench" / "study" / "cache")
    parser.add_argument("--sts", type=Path, default=STS)
    parser.add_argument("--steps", type=int, default=0, help="of a gradient run; 0: 5000, 100 and 30")
    arguments = parser.parse_args()
    if not arguments.sts.is_file():
        sys.exit(f"{arguments.sts} is not here: give STSBenchmark's test split as parquet with --sts")
    prepare_models()
    prepare_workspace(arguments.workspace)
    study = Study(arguments.workspace, arguments.cache, arguments.sts)
    result: dict[str, Any] = {"train_rows": len(study.train), "heldout_rows": len(study.heldout)}
    for part in arguments.part:
        for title, lines in tables(study, part, arguments.steps):
            show(title, lines, {title: lines})
            result[title] = lines
    show("rows", [{"training": len(study.train), "held out": len(study.heldout)}], result)


if __name__ == "__main__":
    main()
