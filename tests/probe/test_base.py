import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.bootstrap import BootstrapParams
from pipeline.core.errors import ParamsError
from pipeline.evaluate.build import Systems
from pipeline.probe.base import ProbeContext, all_probe_params, find_probe, probe_params
from pipeline.probe.descriptions import Description, describe, probe_names
from pipeline.probe.safety import SafetyParams
from tests.encoder.test_inference import write as write_encoder
from tests.evaluate.fakes import LiveParameters, ModelTeacher, retrieval_folder, write_folder
from tests.probe.fakes import write_heldout


@pytest.mark.parametrize("name", probe_names())
def test_a_probe_is_found_and_described_by_its_module_alone(name: str) -> None:
    probe = find_probe(name)
    assert callable(probe.run) and probe.PARAMS.model_config["extra"] == "forbid"
    assert describe(name) == probe.DESCRIPTION and probe.DESCRIPTION.note


def test_other_modules_are_no_probes() -> None:
    assert {"safety", "reasoning"} <= set(probe_names())
    assert not {"base", "passages", "descriptions", "__main__"} & set(probe_names())
    assert describe("base") == describe("gone") == Description()


def test_finding_one_probe_imports_no_other() -> None:
    import subprocess

    code = (
        "import sys; from pipeline.probe.base import find_probe; find_probe('reasoning'); "
        "print([name for name in ('safety', 'alignment', 'interpret') if f'pipeline.probe.{name}' in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("interpret", {"queries": 2, "max_new_tokens": 2}),
        ("alignment", {}),
        ("safety", {"local": "find", "top_k": [1]}),
        ("reasoning", {"local": ["find"]}),
        ("refusal", {"local": "prompts"}),
    ],
)
def test_one_model_is_in_memory_at_a_time(
    workspace: Path, tiny_backbone: Callable[..., Path], name: str, entry: dict[str, Any]
) -> None:
    write_encoder(Path("models/encoder"), tiny_backbone("qwen3"), None)
    write_heldout(width=ModelTeacher.width)
    retrieval_folder(Path("find"))
    rows = [{"id": label, "prompt": f"a {label} prompt", "label": label} for label in ("safe", "unsafe")]
    write_folder(Path("prompts"), {"default": {"test": rows}})
    answers: Any = lambda prompts: ["Sure." for _ in prompts]  # noqa: E731
    count = LiveParameters()
    systems = Systems(
        encoder_dir=Path("models/encoder"),
        open_teacher=lambda: nullcontext(ModelTeacher()),
        answers=answers,
        device="cpu",
        dtype="float32",
        wrap=count.turn,
    )
    context = ProbeContext(
        systems, ["student", "teacher", "untrained"], Path(), Path("work"), "float32", BootstrapParams(resamples=0)
    )
    find_probe(name).run(probe_params({name: entry}, name, "params.yaml"), context)
    assert {"student", "teacher"} <= set(count.models) and set(count.models.values()) == {1}


def test_an_entry_is_read_in_its_own_model() -> None:
    params = probe_params({"safety": {"local": "x", "top_k": [3]}}, "safety", "params.yaml")
    assert params == SafetyParams(local="x", top_k=[3])


def test_all_mistakes_are_told_at_once() -> None:
    entries = {"safety": {"local": "x", "topk": [3]}, "reasoning": 3, "safty": {}}
    with pytest.raises(ParamsError) as caught:
        all_probe_params(entries, "params.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "params.yaml: probes.safety: topk: unknown key (did you mean 'top_k'?)"
    assert lines[1] == "params.yaml: probes.reasoning: must be a mapping (got 3)"
    assert lines[2].startswith("probes.safty: there is no such probe (there are: ")


def test_a_missing_entry_lists_what_there_is() -> None:
    with pytest.raises(ParamsError, match=r"probes.reasoning: missing \(there are: safety\)"):
        probe_params({"safety": {}}, "reasoning", "params.yaml")
