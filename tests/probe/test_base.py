import sys

import pytest

from pipeline.core.errors import ParamsError
from pipeline.probe.base import all_probe_params, find_probe, probe_params
from pipeline.probe.descriptions import Description, describe, probe_names
from pipeline.probe.safety import SafetyParams


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
