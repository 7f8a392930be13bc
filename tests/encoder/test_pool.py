"""Two processes embed as one does; what becomes of dead ones is tested with the teachers."""

from collections.abc import Callable
from contextlib import closing
from operator import methodcaller
from pathlib import Path

import numpy as np
import pytest

from pipeline.encoder.folder.read import read_encoder
from pipeline.encoder.pool import ParallelEncoder, encoder_loader
from pipeline.parallel.devices import split_devices
from tests.encoder.test_inference import write

TEXTS = [f"{'long ' * (index % 7)}text {index}" for index in range(30)]


@pytest.fixture
def folder(workspace: Path, tiny_backbone: Callable[..., Path]) -> Path:
    write(Path("encoder"), tiny_backbone("qwen3"), None)
    return workspace / "encoder"


@pytest.mark.slow
def test_two_processes_embed_as_one(folder: Path) -> None:
    load = encoder_loader(folder, dtype="float32", variant=methodcaller("untrained", 3))
    one = load()
    with closing(ParallelEncoder(load, split_devices(2))) as two:
        assert (two.width, two.max_tokens) == (one.width, one.max_tokens)
        assert (two.identity, two.config, two.parameter_count) == (one.identity, one.config, one.parameter_count)
        for texts in (TEXTS, TEXTS[:1], TEXTS[::-1]):
            found = two.encode(texts, instruction="Say:", batch_tokens=64)
            np.testing.assert_allclose(found, one.encode(texts, instruction="Say:", batch_tokens=64), atol=1e-6)
        assert two.encode([]).shape == (0, one.width)


def test_loaders_give_the_trained_and_the_untrained(folder: Path) -> None:
    trained = read_encoder(folder)
    np.testing.assert_array_equal(encoder_loader(folder, dtype="float32")().encode(TEXTS), trained.encode(TEXTS))
    untrained = encoder_loader(folder, dtype="float32", variant=methodcaller("untrained", 3))()
    np.testing.assert_array_equal(untrained.encode(TEXTS), trained.untrained(3).encode(TEXTS))
