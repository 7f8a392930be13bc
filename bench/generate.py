"""Output tokens per second: this project's vLLM engine beside `generate` of transformers as it is mostly called.

    .venv/bin/python bench/generate.py [--prompts 128] [--new-tokens 128] [--rounds 2] [--dtype float32]

The same prompts (queries of the demo in the backbone's chat template), the same cores, greedy. The other side pads on
the left and takes batches of 8 in the order of the prompts, as the reference implementation of LLM2Vec-Gen does.
Rounds alternate between the two, each in a process of its own on an otherwise idle machine; medians are reported. The
start of the engine is reported apart: a real run pays it once. Tokens after the end of an answer count for neither.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import BACKBONE, demo_queries, prepare_models, run, show

MAX_PROMPT_TOKENS = 256
REFERENCE_BATCH = 8


def prompts(count: int) -> list[list[int]]:
    """Token ids of the demo's queries in the chat template."""
    from pipeline.backbone.loading import BackboneParams, load_tokenizer
    from pipeline.backbone.prompting import PromptFormatter

    formatter = PromptFormatter(load_tokenizer(BackboneParams(name=str(BACKBONE))), "chat", MAX_PROMPT_TOKENS)
    return [prompt.token_ids for prompt in formatter.batch(demo_queries(count))]


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens and seconds of the project's engine, with its own automatic choices."""
    from pipeline.backbone.loading import BackboneParams
    from pipeline.generate.engines.base import Prompt, Sampling
    from pipeline.generate.engines.registry import build_engine, prepare_environment

    prepare_environment("vllm")
    rows = prompts(arguments.prompts)
    started = time.monotonic()
    engine = build_engine(
        "vllm",
        BackboneParams(name=str(BACKBONE)),
        dtype=arguments.dtype,
        max_prompt_tokens=MAX_PROMPT_TOKENS,
        max_new_tokens=arguments.new_tokens,
        data_parallel=arguments.data_parallel,
    )
    with contextlib.closing(engine):
        start_seconds = time.monotonic() - started
        asked = sorted((Prompt(str(index), ids, index) for index, ids in enumerate(rows)), key=_longest_first)
        started = time.monotonic()
        tokens = sum(answer.response_tokens for answer in engine.generate(asked, Sampling(arguments.new_tokens)))
        seconds = time.monotonic() - started
    return {"tokens": tokens, "seconds": seconds, "start_seconds": start_seconds}


def _longest_first(prompt: Any) -> int:
    return -len(prompt.token_ids)


def reference(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens and seconds of `generate` in left-padded batches of 8."""
    import torch

    from pipeline.backbone.loading import BackboneParams, load_backbone, load_tokenizer
    from pipeline.backbone.prompting import pad_left

    backbone = BackboneParams(name=str(BACKBONE), dtype=arguments.dtype)
    rows, end = prompts(arguments.prompts), load_tokenizer(backbone).eos_token_id
    started = time.monotonic()
    model = load_backbone(backbone)
    start_seconds = time.monotonic() - started
    tokens = 0
    started = time.monotonic()
    for first in range(0, len(rows), REFERENCE_BATCH):
        ids, mask = pad_left(rows[first : first + REFERENCE_BATCH])
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=arguments.new_tokens,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        for answer in output[:, ids.shape[1] :].tolist():
            tokens += answer.index(end) + 1 if end in answer else len(answer)
    return {"tokens": tokens, "seconds": time.monotonic() - started, "start_seconds": start_seconds}


SIDES = {"ours": ours, "reference": reference}


def compare(arguments: argparse.Namespace) -> None:
    """Alternate between the two and report."""
    prepare_models()
    settings = ["--prompts", arguments.prompts, "--new-tokens", arguments.new_tokens, "--dtype", arguments.dtype]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, results in found.items():
            results.append(run(["bench/generate.py", "--side", side, *map(str, settings)]).result)
    rate = {side: statistics.median(r["tokens"] / r["seconds"] for r in results) for side, results in found.items()}
    start = {side: statistics.median(r["start_seconds"] for r in results) for side, results in found.items()}
    rows = [
        {
            "side": side,
            "round": index + 1,
            "output tokens": result["tokens"],
            "seconds": round(result["seconds"], 1),
            "tokens/s": round(result["tokens"] / result["seconds"], 1),
            "start, s": round(result["start_seconds"], 1),
        }
        for side, results in found.items()
        for index, result in enumerate(results)
    ]
    result = {
        "speedup": round(rate["ours"] / rate["reference"], 2),
        "ours_tokens_per_s": round(rate["ours"], 1),
        "reference_tokens_per_s": round(rate["reference"], 1),
        "engine_start_s": round(start["ours"], 1),
        "dtype": arguments.dtype,
    }
    show(f"{arguments.prompts} prompts, {arguments.new_tokens} new tokens at most, {arguments.dtype}", rows, result)


def main() -> None:
    """Parse the arguments and run one side or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--data-parallel", type=int, default=1, help="engine processes of our side")
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments)))
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
