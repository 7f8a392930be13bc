"""The automatic choices, in closed form."""

from types import SimpleNamespace

import pytest

from pipeline.core.errors import EngineError
from pipeline.generate.engines.vllm_defaults import GIB, Gpu, cpu_choices, gpu_choices, token_bytes

# 2 (keys, values) * 3 layers * 2 heads * 8 wide * 4 bytes
SHAPE = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, hidden_size=32, head_dim=8)


def test_a_token_in_the_cache() -> None:
    assert token_bytes(SHAPE, "float32") == 384
    assert token_bytes(SHAPE, "bfloat16") == 192
    plain = SimpleNamespace(num_attention_heads=4, num_hidden_layers=3, hidden_size=32)
    assert token_bytes(plain, "float32") == 2 * 3 * 32 * 4
    assert token_bytes(SimpleNamespace(hidden_size=32), "float32") is None


def values(choices: object) -> dict[str, object]:
    return {name: choice.value for name, choice in choices.items()}  # type: ignore[attr-defined]


def test_on_a_cpu_the_cache_holds_all_rows_at_full_length() -> None:
    """A row of 40 tokens takes two blocks of 32; one more block is vLLM's own."""
    chosen = values(cpu_choices(100, 40, free=GIB))
    assert chosen["max_num_seqs"] == 128
    assert chosen["kv_cache_memory_bytes"] == 128 * 64 * 100 + 32 * 100


def test_on_a_cpu_with_little_memory_fewer_rows_run() -> None:
    choices = cpu_choices(100, 64, free=2 * 10 * 6400)
    assert choices["max_num_seqs"].value == 10
    assert "half of the memory" in choices["max_num_seqs"].reason
    assert choices["kv_cache_memory_bytes"].value == 10 * 6400 + 3200


def test_on_a_cpu_the_cache_follows_the_rows_that_the_user_wants() -> None:
    assert cpu_choices(100, 64, GIB, sequences=3)["kv_cache_memory_bytes"].value == 3 * 6400 + 3200


def test_on_a_cpu_with_an_unknown_shape() -> None:
    chosen = values(cpu_choices(None, 64, GIB))
    assert (chosen["max_num_seqs"], chosen["kv_cache_memory_bytes"]) == (128, GIB)


@pytest.mark.parametrize(("total", "sequences"), [(80, 512), (24, 256)])
def test_on_a_free_gpu(total: int, sequences: int) -> None:
    chosen = values(gpu_choices(Gpu(total * GIB, (total - 1) * GIB)))
    assert chosen == {"max_num_seqs": sequences, "gpu_memory_utilization": 0.9}


def test_on_a_shared_gpu_what_is_free_less_a_margin() -> None:
    choice = gpu_choices(Gpu(80 * GIB, 41 * GIB))["gpu_memory_utilization"]
    assert choice.value == 0.5
    assert "39.0 of 80.0 GiB" in choice.reason


def test_on_a_full_gpu() -> None:
    full = Gpu(80 * GIB, 2 * GIB)
    with pytest.raises(EngineError, match=r"^options\.gpu_memory_utilization: .*78\.0 of 80\.0 GiB"):
        gpu_choices(full)
    assert values(gpu_choices(full, utilization=0.02)) == {"max_num_seqs": 512}


def test_on_a_gpu_of_unknown_size() -> None:
    assert values(gpu_choices(None)) == {"max_num_seqs": 256}
