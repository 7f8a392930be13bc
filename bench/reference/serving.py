"""The inside of a measured process: orders come in on stdin, one JSON object a line, answers go out on stdout."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def arguments() -> argparse.Namespace:
    """What every measured process is told: workspace folder, precision, device, variant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dtype", choices=[*DTYPES], required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--variant", default="fast")
    return parser.parse_args()


def claim_stdout() -> int:
    """Keep stdout for answers, and return where to write them: what libraries print goes to stderr."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies


def orders() -> Iterator[dict[str, Any]]:
    """What is asked, until stdin ends."""
    return (json.loads(line) for line in sys.stdin)


def write(replies: int, answer: Mapping[str, Any]) -> None:
    """Send one answer."""
    os.write(replies, (json.dumps(answer) + "\n").encode())
