"""Soft prompts of a file: three formats, the same vectors; what is none is said in one line."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from pipeline.core.errors import SourceError
from pipeline.core.files import write_parquet
from pipeline.lens.sources import open_soft_prompts

SOFT = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)


def write(path: Path, soft: np.ndarray = SOFT) -> Path:
    if path.suffix == ".npy":
        np.save(path, soft)
    elif path.suffix == ".safetensors":
        save_file({"soft_prompts": soft, "other": np.zeros(3, np.float32)}, path)
    else:
        write_parquet(pa.table({"id": list(range(len(soft))), "soft_prompts": soft.tolist()}), path)
    return path


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "parquet"])
def test_every_format_gives_the_same_chunks(tmp_path: Path, suffix: str) -> None:
    stored = open_soft_prompts(write(tmp_path / f"soft.{suffix}"), 3)
    assert (stored.rows, stored.tokens, stored.hidden) == (5, 2, 3)
    chunks = list(stored.chunks(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert all(chunk.dtype == np.float32 for chunk in chunks)
    np.testing.assert_array_equal(np.concatenate(chunks), SOFT)


def test_one_tensor_needs_no_name_and_half_precision_is_read(tmp_path: Path) -> None:
    save_file({"x": SOFT.astype(np.float16)}, tmp_path / "half.safetensors")
    [chunk] = open_soft_prompts(tmp_path / "half.safetensors", 3).chunks(9)
    np.testing.assert_array_equal(chunk, SOFT.astype(np.float16).astype(np.float32))


def test_what_is_no_soft_prompt_is_said(tmp_path: Path) -> None:
    def fails(message: str, name: str) -> None:
        with pytest.raises(SourceError, match=f"(?s)soft_prompts: .*{message}"):
            open_soft_prompts(tmp_path / name, 3)

    fails("gone.npy does not exist", "gone.npy")
    (tmp_path / "a.pt").write_bytes(b"x")
    fails(r"a.pt has an unknown format \(known: .npy, .safetensors, .parquet\)", "a.pt")
    np.save(tmp_path / "flat.npy", SOFT[0])
    fails(r"holds float32 of shape \[2, 3\], expected floats", "flat.npy")
    np.save(tmp_path / "ints.npy", SOFT.astype(np.int64))
    fails("holds int64", "ints.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    fails("objects.npy is damaged or no npy file", "objects.npy")
    (tmp_path / "empty.npy").write_bytes(b"")
    fails("empty.npy is damaged", "empty.npy")
    np.save(tmp_path / "none.npy", SOFT[:0])
    fails("none.npy holds no soft prompt", "none.npy")
    np.save(tmp_path / "wide.npy", np.zeros((1, 2, 4), np.float32))
    fails("vectors of 4 dimensions, the backbone's have 3", "wide.npy")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    fails("torn.safetensors is damaged", "torn.safetensors")
    save_file({"a": SOFT, "b": SOFT}, tmp_path / "two.safetensors")
    fails("2 tensors and none is called soft_prompts", "two.safetensors")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    fails("torn.parquet is damaged", "torn.parquet")
    write_parquet(pa.table({"text": ["x"]}), tmp_path / "texts.parquet")
    fails(r"no column 'soft_prompts' \(but text\)", "texts.parquet")
    write_parquet(pa.table({"soft_prompts": [[[1.0, 2.0, 3.0], [1.0]]]}), tmp_path / "ragged.parquet")
    fails("must hold lists of equally long lists", "ragged.parquet")


def test_a_row_that_is_not_finite_is_named(tmp_path: Path) -> None:
    wrong = SOFT.copy()
    wrong[3, 1, 0] = np.nan
    stored = open_soft_prompts(write(tmp_path / "soft.npy", wrong), 3)
    with pytest.raises(SourceError, match="a value in row 3 that is not finite"):
        list(stored.chunks(2))
