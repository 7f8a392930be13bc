"""How faithful decoded answers become with training steps, by loss and rate: SmolLM2-135M, short answers.

    .venv/bin/python bench/decoding.py [--workspace DIR] [--run NAME ...] [--steps 50 100 200 400 800] [--seed 0]

The workspace gets Alpaca queries, the backbone's answers and targets of all-MiniLM-L6-v2 where they are not there yet.
Each run trains with the pipeline's own trainer from the closed form, 8 rows a step, at a rate that stays as it is
after the warm-up, so one run passes all step counts. At each count the held-out answers are decoded and judged. All
runs reach a count before one goes on to the next. Killed and called again, it goes on from the last checkpoint.

CE         nats per held-out response token, given the row's own soft prompts
CE other   the same given another row's: what the soft prompts say of this answer is the difference
KL         from the backbone's distribution given the query to that given the soft prompts
closed     of the way from CE without a query (an empty turn) to CE with the query
cosine     of the teacher's embeddings of the decoded text and of the true answer; chance: of shuffled pairs
top-1      decoded texts that are nearest to their own answer among all held-out ones
nearest    cosine of the known training answer nearest to the student's embedding: what the text must beat
embedding  top-1 of the student's embedding itself; solved: with the alignment in closed form again (--solve)

The first lines have no student: the greedy answer without a query, and another answer that the backbone samples given
the query, at temperature 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from bench.common import BACKBONE, ROOT, TEACHER, prepare_models, show
from bench.distillation import Answer, DistillationPass, answer_logs, divergences, following, next_tokens
from bench.training_study.data import cached
from bench.training_study.workspace import prepare_workspace

ROWS, TOKENS, HELDOUT = 2_000, 16, 96
STEPS = (50, 100, 200, 400, 800)
BATCH, WARMUP, CHECKPOINT_EVERY = 8, 20, 25
START_ROWS = 512  # of the closed form
FAR = 1_000_000  # steps until a falling rate would be 0: it stays as it is
QUERY_ROWS, DECODED_ROWS = 32, 64
EXAMPLES = 8
COLUMNS = (
    *("CE", "CE other", "KL", "closed", "cosine", "low", "high", "chance", "top-1"),
    *("nearest", "embedding", "nearest solved", "embedding solved"),
)
Line = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run: whether it learns the backbone's distributions, its rates, the weight of the alignment."""

    distilled: bool = False
    rate: float = 1e-5
    token_rate: float = 3e-3
    align_weight: float = 1.0


RUNS = {
    "ce": Run(),
    "kl": Run(distilled=True),
    "ce-fast": Run(rate=3e-4),
    "kl-fast": Run(distilled=True, rate=3e-4),
    "ce-alone": Run(align_weight=0.0),
    "ce-fast-alone": Run(rate=3e-4, align_weight=0.0),
}


class Study:
    """Data and models of all runs."""

    def __init__(self, workspace: Path, seed: int) -> None:
        """Loads backbone and teacher, and reads the rows; `seed` is of the new tokens and of the rows' order."""
        from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_tokenizer
        from pipeline.embed.teachers.sentence_transformers import SentenceTransformersTeacher
        from pipeline.encoder.passes.select import make_passes
        from pipeline.train.build import query_formatter

        self.folder = workspace / "decoding"
        self.runs = self.folder / f"seed-{seed}"
        self.runs.mkdir(parents=True, exist_ok=True)
        loaded = BackboneParams(name=str(BACKBONE), dtype="bfloat16")
        self.backbone, self.tokenizer = load_backbone(loaded), load_tokenizer(loaded)
        self.teacher = SentenceTransformersTeacher(str(TEACHER), revision=None, max_tokens=256, dtype="float32")
        self.origin = {**identify(loaded.name, None), "dtype": loaded.dtype}
        self.passes = make_passes(self.backbone)
        self.section = train_section(workspace) | {"seed": seed}
        formatter = query_formatter(self.params(Run(), 1), loaded, self.tokenizer)
        self.empty = formatter("").token_ids
        self.train, heldout = (self._rows(workspace, name, formatter) for name in ("train", "heldout"))
        self.heldout = heldout.head(HELDOUT)

    def params(self, run: Run, steps: int) -> Any:
        """Section `train` of a run up to these steps."""
        from pipeline.train.params import TrainParams

        return TrainParams.model_validate(
            self.section
            | {
                "align_weight": run.align_weight,
                "learning_rate": run.rate,
                "token_learning_rate": run.token_rate,
                "stop_after_steps": steps,
            }
        )

    def _rows(self, workspace: Path, name: str, formatter: Any) -> Any:
        from pipeline.core.artifacts import open_artifact
        from pipeline.core.paths import QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR
        from pipeline.train.build import read_rows

        artifacts = [open_artifact(workspace / path, path.name) for path in (QUERIES_DIR, RESPONSES_DIR, TARGETS_DIR)]
        rows = read_rows(self.params(Run(), 1), artifacts, f"{name}.parquet", self.tokenizer, formatter)
        rows = rows.head(len(rows))
        return replace(rows, response_ids=list(map(Answer, rows.response_ids, rows.query_ids)))

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """CE of the held-out answers without a query and with it."""
        empty = [self.empty] * len(self.heldout)
        compute = partial(next_tokens, self.backbone, empty, self.heldout.response_ids)
        without = cached(self.folder, "without-query", compute)["own"]
        return -float(without.mean()), -float(self.wanted["own"].mean())

    @cached_property
    def wanted(self) -> np.ndarray:
        """The backbone's distributions at the held-out response tokens, given the query."""
        return cached(self.folder, "with-query", partial(following, self.backbone, self.heldout.response_ids))

    def trainer(self, name: str, steps: int) -> Any:
        """A trainer of a run that is ready for these steps: at its checkpoint, or at the closed form."""
        from accelerate import Accelerator

        from pipeline.encoder.student import new_student
        from pipeline.train.build import start_student
        from pipeline.train.trainer import Trainer

        run = RUNS[name]
        passes = replace(self.passes, response_pass=DistillationPass(self.backbone)) if run.distilled else self.passes
        params = self.params(run, steps)
        trainer = Trainer(
            new_student(
                self.backbone,
                self.train.width,
                compression_tokens=params.compression_tokens,
                thought_tokens=params.thought_tokens,
                seed=params.seed,
            ),
            passes,
            self.train,
            params,
            Accelerator(cpu=True),
            checkpoint=self.runs / f"{name}.checkpoint",
            origin=self.origin,
        )
        if not trainer.resume():
            start_student(trainer, self.backbone, self.empty)
        return trainer

    def judge(self, student: Any, states: Any) -> Line:
        """A student's held-out rows, from their hidden states `[N, n, d]`."""
        import torch

        with torch.inference_mode():
            soft = student.soft_prompts(states)
            own, divergence = self._reconstruction(soft)
            other, tokens = self.passes.response_pass(soft.roll(1, dims=0), self.heldout.response_ids)
        without, given = self.bounds
        return {
            "CE": own,
            "CE other": float(other) / tokens,
            "KL": divergence,
            "closed": (without - own) / (without - given),
            **self.faithfulness(self._decoded(soft.numpy())),
            **self.retrieval(student, states),
        }

    def states(self, student: Any) -> Any:
        """Hidden states `[N, n, d]` of the held-out queries."""
        import torch

        starts = range(0, len(self.heldout), QUERY_ROWS)
        queries = [self.heldout.query_ids[start : start + QUERY_ROWS] for start in starts]
        count = student.compression_tokens
        with torch.inference_mode():
            return torch.cat([self.passes.query_pass(some, student.tokens, count) for some in queries])

    def retrieval(self, student: Any, states: Any) -> Line:
        """What the embeddings themselves find."""
        import torch

        from pipeline.core.vectors import rank_own, top_k

        with torch.inference_mode():
            embeddings = student(states)[1].numpy()
        known, _ = top_k(embeddings, [self.train.targets], 1)
        return {
            "nearest": rank_own(self.train.targets[known[:, 0]], self.heldout.targets).cosine,
            "embedding": rank_own(embeddings, self.heldout.targets).top1,
        }

    def _reconstruction(self, soft: Any) -> tuple[float, float]:
        """CE and KL in nats a token, given soft prompts."""
        import torch

        logs = answer_logs(self.backbone, soft, self.heldout.response_ids)
        labels = torch.tensor([[token] for answer in self.heldout.response_ids for token in answer])
        divergence = divergences(logs, self.wanted)
        return -float(logs.gather(1, labels).mean()), float(divergence.mean())

    def _decoded(self, soft: np.ndarray) -> list[str]:
        from pipeline.lens.decoding import decode_soft_prompts

        encoder: Any = SimpleNamespace(model=self.backbone, tokenizer=self.tokenizer)
        return decode_soft_prompts(encoder, soft, max_new_tokens=TOKENS, batch_size=DECODED_ROWS)

    def faithfulness(self, texts: Sequence[str]) -> Line:
        """How near texts are to the held-out answers in the teacher's space, and the first of them."""
        from pipeline.core.bootstrap import BootstrapParams
        from pipeline.core.vectors import rank_own
        from pipeline.lens.faithfulness import pair, summary

        embeddings = self.teacher.embed(list(texts))
        pairs = pair(embeddings, self.heldout.targets)
        found = summary("cosine", pairs, BootstrapParams())
        top1 = rank_own(embeddings, self.heldout.targets).top1
        return {
            "cosine": found.mean,
            "low": found.low,
            "high": found.high,
            "chance": found.chance,
            "top-1": top1,
            "cosines": pairs.own.tolist(),
            "texts": list(texts[:EXAMPLES]),
        }

    def references(self) -> dict[str, Line]:
        """Answers without a student."""
        without, given = self.bounds
        count = len(self.heldout)
        bare = self._answered([self.empty])
        sampled = self._answered(self.heldout.query_ids, temperature=1.0)
        answers = self.tokenizer.batch_decode(self.heldout.response_ids[:EXAMPLES], skip_special_tokens=True)
        return {
            "no query": {"CE": without, "closed": 0.0, **self.faithfulness(bare * count)},
            "query, sampled": {"CE": given, "KL": 0.0, "closed": 1.0, **self.faithfulness(sampled)},
            "query, greedy": {"texts": answers},
        }

    def _answered(self, prompts: Sequence[Sequence[int]], temperature: float = 0.0) -> list[str]:
        from pipeline.generate.engines.base import Prompt, Sampling
        from pipeline.generate.engines.transformers import TransformersEngine

        limit = max(map(len, prompts)) + TOKENS
        engine = TransformersEngine(self.backbone, self.tokenizer, max_model_len=limit, batch_size=QUERY_ROWS)
        asked = [Prompt(str(row), list(ids), seed=row) for row, ids in enumerate(prompts)]
        found = {answer.id: answer.text for answer in engine.generate(asked, Sampling(TOKENS, temperature))}
        return [found[prompt.id] for prompt in asked]


def train_section(workspace: Path) -> dict[str, Any]:
    """Section `train` of the demo with the study's template, data and schedule."""
    from pipeline.core.config import load
    from pipeline.train.__main__ import Inputs

    demo = load(workspace / "params.yaml", Inputs).train.model_dump()
    return demo | {
        "template": "chat",
        "pool": "tokens",
        "align_reduction": "sum",  # targets have unit length
        "response_share": 1.0,
        "response_form": "beside",
        "epochs": FAR,
        "batch_size": BATCH,
        "micro_batch_size": BATCH,
        "length_grouping": 1,  # the same rows in each step, whichever loss
        "schedule_steps": FAR,
        "warmup_steps": WARMUP,
        "warm_start": {"enabled": True, "ridge": "auto", "rows": START_ROWS},
        "checkpoint_every": CHECKPOINT_EVERY,
    }


def computed(file: Path, compute: Any) -> Any:
    """What was computed once, as JSON in a file."""
    if not file.is_file():
        content = json.dumps(compute())
        file.with_suffix(".tmp").write_text(content, encoding="utf-8")
        file.with_suffix(".tmp").rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


def trained(study: Study, name: str, steps: int, *, solve: bool) -> Line:
    """Train a run to these steps, 0: as it starts, and judge it; `solve`: also with the alignment fitted again."""
    from pipeline.train.refit import refit_alignment

    trainer = study.trainer(name, max(1, steps))
    if steps:
        trainer.run()
    student = trainer.student
    states = study.states(student)
    line = study.judge(student, states)
    if solve:
        refit_alignment(trainer)
        trainer.checkpoint = study.runs / f"{name}-refitted.checkpoint"
        trainer.save()
        line |= {f"{key} solved": value for key, value in study.retrieval(student, states).items()}
    print({"run": name, "step": steps, **shown(line)}, file=sys.stderr)
    return line


def shown(line: Line) -> Line:
    """A line of the table."""
    return {name: round(line[name], 3) if name in line else "" for name in COLUMNS}


def main() -> None:
    """Train, judge and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=ROOT / ".bench" / "decoding")
    parser.add_argument("--run", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="ascending")
    parser.add_argument("--seed", type=int, default=0, help="of the new tokens and of the order of the rows")
    parser.add_argument("--solve", action="store_true", help="judge each student with its alignment solved again, too")
    arguments = parser.parse_args()
    workspace = arguments.workspace.resolve()
    os.environ["PIPELINE_WORK_DIR"] = str(workspace / ".work")
    from pipeline.core.run import prepare_process

    prepare_process()
    prepare_models()
    prepare_workspace(workspace, ROWS, TOKENS)
    study = Study(workspace, arguments.seed)
    found: dict[tuple[str, int], Line] = {}
    references = computed(study.folder / "references.json", study.references)
    for steps in (0, *arguments.steps):
        for name in arguments.run if steps else ["ce"]:
            compute = partial(trained, study, name, steps, solve=arguments.solve)
            found[name if steps else "start", steps] = computed(study.runs / f"{name}-{steps}.json", compute)
    without, given = study.bounds
    lines = [{"run": name, "step": "", **shown(line)} for name, line in references.items() if "CE" in line]
    lines += [{"run": name, "step": str(step), **shown(line)} for (name, step), line in found.items()]
    rows = {"training": len(study.train), "held out": len(study.heldout), "seed": arguments.seed}
    runs = {name: asdict(RUNS[name]) for name in arguments.run}
    show(
        f"{rows}, CE {without:.3f} without a query, {given:.3f} with it", lines, {**rows, "runs": runs, "lines": lines}
    )


if __name__ == "__main__":
    main()
