"""The packed reader where it is right, the padded one with a warning where it is not."""

import logging
from typing import Any

import pytest
import torch

from pipeline.backbone.attention.grouped import group_attention, runs
from pipeline.backbone.attention.per_segment import segment_attention
from pipeline.backbone.attention.segments import Segments
from pipeline.backbone.loading import BackboneParams, load_backbone
from pipeline.encoder.passes.prompt_reader import PackedReader, PaddedReader, prompt_reader
from tests.conftest import tiny_model


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_architectures_are_packed(architecture: str, dtype: torch.dtype, caplog: Any) -> None:
    model = tiny_model(architecture).to(dtype)
    assert isinstance(prompt_reader(model), PackedReader)
    assert "cannot" not in caplog.text
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_reader_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    read = PackedReader.read

    def wrong(self: PackedReader, *args: Any) -> torch.Tensor:
        return read(self, *args) * 1.01

    monkeypatch.setattr(PackedReader, "read", wrong)
    with caplog.at_level(logging.WARNING):
        reader = prompt_reader(tiny_model())
    assert isinstance(reader, PaddedReader)
    assert reader.padded
    assert "packed reading with groups attention cannot be used on this backbone: its hidden states differ from the " \
        "plain ones by 0.01 (limit 0.001)" in caplog.text  # fmt: skip


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_groups_attend_as_segments_do(shared: int, window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    segments = Segments.of([7, 7, 3, 3, 3, 1, 7], shared=shared)
    query = torch.randn(1, 4, 31, 8)
    key, value = torch.randn(2, 1, 2, shared + 31, 8)
    settings: dict[str, Any] = {"packed": segments, "sliding_window": window, "softcap": softcap}
    found, _ = group_attention(None, query, key, value, None, **settings)
    expected, _ = segment_attention(None, query, key, value, None, **settings)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found.shape == (1, 31, 4, 8)


def test_sequences_with_a_cache_of_their_own_do_not_attend_in_groups() -> None:
    states = torch.zeros(1, 1, 4, 2)
    with pytest.raises(ValueError, match="shared beginning"):
        group_attention(None, states[:, :, :2], states, states, None, packed=Segments.of([1, 1], [1, 1]))


def test_runs_of_one_length() -> None:
    assert list(runs([4, 4, 2, 4])) == [(slice(0, 8), 2), (slice(8, 10), 1), (slice(10, 14), 1)]


def test_a_beginning_serves_many_batches() -> None:
    model = tiny_model("gemma3")  # the beginning is longer than its window of 16
    reader = prompt_reader(model)
    tokens, ids = torch.randn(2, 32), list(range(10, 40))
    with torch.inference_mode():
        beginning = reader.begin(ids)
        for rests in ([[5], [6, 7]], [[8, 9, 10]], [[5], [6, 7]]):
            whole = [[*ids, *rest] for rest in rests]
            found, expected = reader.read(beginning, rests, tokens, 2), reader.read(reader.begin([]), whole, tokens, 2)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.models
def test_a_real_backbone_is_packed(small_lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    for dtype in ("float32", "bfloat16"):
        reader = prompt_reader(load_backbone(BackboneParams.model_validate({"name": str(small_lm), "dtype": dtype})))
        assert isinstance(reader, PackedReader)
    assert "cannot" not in caplog.text
