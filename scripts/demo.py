"""Run the demo: the same stages as the real run, in a workspace of its own, `.demo/`.

    python scripts/demo.py [--dry --force]    # --dry --force lists the stages

The workspace holds a copy of what the stages read, so the user's tree stays clean, and what `dvc repro` makes there
stays for the next call, which then has nothing to do.
"""

import filecmp
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.evaluate.comparison import compare
from pipeline.report.verdict import verdict

ROOT = Path(__file__).resolve().parent.parent
WORKSPACE = ROOT / ".demo"
# Without .dvcignore DVC takes the bytecode that Python keeps beside the code for a change of it.
COPIED = {
    "pipeline": "pipeline",
    "data/demo": "data/demo",
    "dvc.yaml": "dvc.yaml",
    ".dvcignore": ".dvcignore",
    "params.demo.yaml": "params.yaml",
}
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as /proc/cpuinfo spells them
MODELS = ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2")


def sync(source: Path, target: Path) -> None:
    """Make `target` equal to `source`, touching only what differs."""
    if source.is_file():
        if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
        return
    names = {path.name for path in source.iterdir() if path.name != "__pycache__"}
    target.mkdir(parents=True, exist_ok=True)
    for extra in (path for path in target.iterdir() if path.name not in names and path.name != "__pycache__"):
        shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    for name in sorted(names):
        sync(source / name, target / name)


def lay_out() -> None:
    """The workspace: code, data, params, links to the models, a DVC repository of its own."""
    for source, target in COPIED.items():
        sync(ROOT / source, WORKSPACE / target)
    adapt(
        WORKSPACE / "params.yaml",
        vllm=importlib.util.find_spec("vllm") is not None,
        bfloat16=multiplies_bfloat16(Path("/proc/cpuinfo")),
    )
    (WORKSPACE / "models").mkdir(exist_ok=True)
    for name in MODELS:
        link = WORKSPACE / "models" / name
        if not link.is_symlink():
            link.symlink_to(Path("../../models") / name)
    if not (WORKSPACE / ".dvc").is_dir():
        dvc("init", "--quiet", "--no-scm")
        for setting in ("core.analytics", "core.check_update"):
            dvc("config", setting, "false")


def adapt(params: Path, *, vllm: bool, bfloat16: bool) -> None:
    """Fit the demo's params to the machine.

    Args:
        vllm: is installed; it has no CPU build for macOS.
        bfloat16: the CPU multiplies it; where it does not, float32 is faster.
    """
    yaml = YAML()
    found = yaml.load(params)
    if not vllm:
        found["generate"] |= {"engine": "transformers", "options": {}}
    if not bfloat16:
        for section in (found["backbone"], found["generate"], found["embed"]["teacher"], found["evaluate"]):
            section["dtype"] = "float32"
    if not (vllm and bfloat16):
        yaml.dump(found, params)


def multiplies_bfloat16(cpuinfo: Path) -> bool:
    """Whether the CPU has instructions for it: AVX512-BF16 or AMX on x86, BF16 on Arm; no without that file."""
    return cpuinfo.is_file() and not BFLOAT16_FLAGS.isdisjoint(cpuinfo.read_text(encoding="utf-8").split())


def dvc(*arguments: str) -> None:
    """Run dvc in the workspace with this interpreter's environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=WORKSPACE, env={**os.environ, "PATH": path})
    if done.returncode:
        sys.exit(done.returncode)


def main_numbers() -> str:
    """The verdict of the run, then two tables: what held-out queries find, and the scores of the tasks."""
    record = read("evaluate/demo.json")
    found = verdict([compare("demo", record)], 0.0, read("train.json")["rows"])
    tables = [
        table(title, metrics, columns)
        for title, metrics, columns in (
            ("held-out queries", read("probe/alignment.json")["metrics"], ("cosine", "top1", "mrr")),
            ("tasks", record["metrics"], ("retrieval", "sts", "classification")),
        )
    ]
    return "\n\n".join(["\n".join([found.sentence, *found.lines]) if found else "", *tables])


def table(title: str, metrics: dict[str, float], columns: tuple[str, ...]) -> str:
    """Metrics `<system>/<column>` as text."""
    systems = list(dict.fromkeys(key.split("/")[0] for key in metrics if key.endswith(f"/{columns[0]}")))
    lines = [f"{title:<28}" + "".join(f"{column:>16}" for column in columns)]
    lines += [
        f"{system:<28}" + "".join(f"{metrics[f'{system}/{column}']:>16.3f}" for column in columns)
        for system in systems
        if system != "delta"
    ]
    return "\n".join(lines)


def read(name: str) -> Any:
    """A JSON file of the workspace's results."""
    return json.loads((WORKSPACE / "results" / name).read_text(encoding="utf-8"))


def main() -> None:
    """Lay out, reproduce, say where the report is."""
    started = time.monotonic()
    lay_out()
    dvc("repro", *sys.argv[1:])
    if "--dry" in sys.argv[1:]:
        return
    report = os.path.relpath(WORKSPACE / "results" / "report.html")
    print(f"\n{main_numbers()}\n\nreport: {report} ({time.monotonic() - started:.0f} s)\n\n{next_commands()}")


def next_commands() -> str:
    """What to try with the trained encoder, as commands that work as they are printed."""
    python, corpus = "../.venv/bin/python -m pipeline", "data/demo/tasks/retrieval/corpus/corpus.jsonl"
    return "\n".join(
        [
            f"cd {WORKSPACE.name}",
            f'{python} search --model models/encoder --corpus {corpus} "How do I warm up before a run?" -k 3',
            f'{python} decode --model models/encoder "What is the capital of France?"',
            f"{python} inspect generate --n 3",
        ]
    )


if __name__ == "__main__":
    main()
