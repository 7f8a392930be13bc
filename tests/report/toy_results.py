"""Records of a finished toy run, as its stages would write them, and the content made from them."""

from pathlib import Path
from typing import Any

from pipeline.report.content import Content, gather

ENVIRONMENT = {"cores": 2, "memory_gib": 6.0, "gpus": [], "versions": {"torch": "2.13.0"}, "git_revision": "abc1234"}
RECORD: dict[str, Any] = {
    "seconds": 65.0,
    "peak_memory_mib": 1200,
    "started": "2026-01-02T03:04:05Z",
    "environment": ENVIRONMENT,
}
SYSTEMS = {
    "student": {"prompting": "generative instruction", "space": "the teacher's"},
    "teacher": {"prompting": "bare text", "space": "the teacher's"},
}
ALIGNMENT = {
    "candidates": 60,
    "student/cosine": 0.61,
    "student/top1": 0.75,
    "teacher/cosine": 0.68,
    "teacher/top1": 0.91,
}
SUITE = {
    "student/Facts": 0.5, "student/mean/tasks": 0.5, "teacher/Facts": 0.625, "teacher/mean/tasks": 0.625,
    "delta/Facts": -0.125, "delta/mean/tasks": -0.125,
}  # fmt: skip
SAFETY = {"requests": 10, "student/accuracy@1": 0.2, "teacher/accuracy@1": 0.6, "reduction/student/accuracy@1": 66.67}
EVIL = "<script>alert(1)</script>"
SAMPLE = {
    "query": f"What is {EVIL}?", "response": "A | b", "decoded": "x\x1b[31m", "faithfulness": 0.5,
    "vocabulary": [["law", " illegal"], ["law", "court"]],
}  # fmt: skip
SAFER = {
    "metric": "accuracy@1", "system": "teacher", "delta": -0.4, "low": -0.5, "high": -0.3, "verdict": "better",
    "units": 10,
}  # fmt: skip
NOISE = {
    "metric": "Facts", "system": "teacher", "delta": -0.125, "low": -0.3, "high": 0.05, "verdict": "within noise",
    "units": 40,
}  # fmt: skip
NOT_DRAWN = {
    "metric": "mean/tasks", "system": "teacher", "delta": -0.125, "low": None, "high": None, "verdict": "no interval",
    "units": 0,
}  # fmt: skip


def content_of(root: Path = Path(), **more: Any) -> Content:
    """The content of the toy run."""
    return gather("Toy", {"demo": {}}, {"alignment": {}, "safety": {}, "interpret": {}}, root, **more)
