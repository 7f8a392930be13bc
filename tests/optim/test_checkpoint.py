"""Checkpoints give back what they were given, and refuse what is not theirs."""

from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.optim import AdamW

from pipeline.core.errors import TrainingError
from pipeline.optim.checkpoint import read_checkpoint, save_checkpoint


def trained(rows: int = 2) -> dict[str, Parameter]:
    torch.manual_seed(rows)
    return {"tokens": Parameter(torch.randn(rows, 3)), "weight": Parameter(torch.randn(3))}


def after_a_step(parameters: dict[str, Parameter]) -> AdamW:
    optimizer = AdamW(parameters.values(), lr=0.1)
    sum(value.square().sum() for value in parameters.values()).backward()
    optimizer.step()
    return optimizer


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    before = trained()
    optimizer = after_a_step(before)
    save_checkpoint(tmp_path / "c", before, optimizer, {"step": 1}, {"best": torch.arange(3)})
    found = read_checkpoint(tmp_path / "c")
    assert found is not None
    assert found.progress == {"step": 1}
    assert found.kept["best"].tolist() == [0, 1, 2]
    after = {name: Parameter(torch.zeros_like(value)) for name, value in before.items()}
    fresh = AdamW(after.values(), lr=0.1)
    found.restore(after, fresh)
    for name, value in before.items():
        assert torch.equal(value, after[name])
        assert all(torch.equal(state, fresh.state[after[name]][slot]) for slot, state in optimizer.state[value].items())


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    parameters = trained()
    save_checkpoint(tmp_path / "c", parameters, after_a_step(parameters), {})
    found, other = read_checkpoint(tmp_path / "c"), trained(rows=4)
    assert found is not None
    with pytest.raises(TrainingError, match=r"other params: tokens has shape \(2, 3\) there, \(4, 3\) here"):
        found.restore(other, AdamW(other.values()))


@pytest.mark.parametrize("at", [3, 70, -1])
def test_a_flipped_byte_is_no_checkpoint(tmp_path: Path, at: int) -> None:
    parameters = trained()
    save_checkpoint(tmp_path / "c", parameters, after_a_step(parameters), {})
    content = bytearray((tmp_path / "c").read_bytes())
    content[at] ^= 1
    (tmp_path / "c").write_bytes(content)
    assert read_checkpoint(tmp_path / "c") is None
    assert read_checkpoint(tmp_path / "nothing") is None
