"""How often vLLM's greedy answers depend on which requests share a batch.

    .venv/bin/python bench/determinism.py [--prompts 96] [--new-tokens 48] [--dtypes float32 bfloat16]

The same prompts are answered in their order with 64 sequences at once, in another order with 64, and in their order
with 16; each in a process of its own. Rows whose text differs from the first run's are counted.
"""

import argparse
import contextlib
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import BACKBONE, demo_queries, prepare_models, run, show

MAX_PROMPT_TOKENS = 256
RUNS = {"same order, 64 at once": (0, 64), "again": (0, 64), "other order": (1, 64), "16 at once": (0, 16)}


def answers(dtype: str, prompts: int, new_tokens: int, order: int, sequences: int) -> dict[str, str]:
    """Text by number of the prompt."""
    from pipeline.backbone.loading import BackboneParams, load_tokenizer
    from pipeline.backbone.prompting import PromptFormatter
    from pipeline.generate.engines.base import Prompt, Sampling
    from pipeline.generate.engines.registry import build_engine, prepare_environment

    prepare_environment("vllm")
    backbone = BackboneParams(name=str(BACKBONE))
    formatter = PromptFormatter(load_tokenizer(backbone), "chat", MAX_PROMPT_TOKENS)
    rows = [Prompt(str(i), each.token_ids, i) for i, each in enumerate(formatter.batch(demo_queries(prompts)))]
    if order:
        random.Random(order).shuffle(rows)
    engine = build_engine(
        "vllm",
        backbone,
        dtype=dtype,  # type: ignore[arg-type]  # one of the choices of the command line
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=new_tokens,
        options={"max_num_seqs": sequences},
    )
    with contextlib.closing(engine):
        return {answer.id: answer.text for answer in engine.generate(rows, Sampling(new_tokens))}


def differing(first: dict[str, str], other: dict[str, str]) -> int:
    """Rows whose text differs."""
    return sum(first[row] != other[row] for row in first)


def main() -> None:
    """Run each composition in each precision and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        dtype, order, sequences = arguments.one
        print(json.dumps(answers(dtype, arguments.prompts, arguments.new_tokens, int(order), int(sequences))))
        return
    prepare_models()
    table = []
    for dtype in arguments.dtypes:
        found = {}
        for name, (order, sequences) in RUNS.items():
            size = ["--prompts", str(arguments.prompts), "--new-tokens", str(arguments.new_tokens)]
            found[name] = run(["bench/determinism.py", *size, "--one", dtype, str(order), str(sequences)]).result
        first, *others = found.values()
        names = list(RUNS)[1:]
        table += [
            {"dtype": dtype, "run": name, "differ": differing(first, other), "rows": len(first)}
            for name, other in zip(names, others, strict=True)
        ]
    differ = {f"{line['dtype']}, {line['run']}": line["differ"] for line in table}
    show("greedy answers against the first run", table, {"prompts": arguments.prompts, "differ": differ})


if __name__ == "__main__":
    main()
