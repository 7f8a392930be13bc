"""Full-size models whose weights are fake tensors on the fake GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bench.fake_gpu.device import DEVICE
from pipeline.cli.presets import presets

# Gemma 3 1B has no preset: its sizes stand here.
GEMMA3_1B: dict[str, Any] = dict(
    hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=1,
    head_dim=256, vocab_size=262_144, max_position_embeddings=32_768, sliding_window=512,
)  # fmt: skip
NAMES = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "llama-3.2-1b", "qwen2.5-7b", "gemma3-1b")


def config_of(name: str, layers: int | None = None) -> Any:
    """The transformers config of a preset's backbone, or of Gemma 3 1B; `layers` cuts it short."""
    from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

    if name.startswith("gemma3"):
        return Gemma3TextConfig(**GEMMA3_1B | ({"num_hidden_layers": layers} if layers else {}))
    sizes = presets()[name].sizes
    kind = next(
        kind
        for start, kind in {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}.items()
        if name.startswith(start)
    )
    return kind(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=layers or sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab_size=sizes.vocabulary,
        tie_word_embeddings=sizes.tied,
        max_position_embeddings=40_960,
    )


def fake_model(config: Any, mode: Any) -> Any:
    """A frozen causal LM in bfloat16 of this config, its tensors fake and on the fake GPU.

    Args:
        config: of the model.
        mode: the `FakeTensorMode` that its tensors belong to.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    make_fake(model, mode)
    return model.eval()


def make_fake(model: Any, mode: Any) -> None:
    """Replace a module's parameters (frozen) and buffers by fake tensors on the fake GPU; shared ones stay shared."""
    import torch

    made: dict[int, Any] = {}

    def on_device(tensor: Any) -> Any:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in made:
                        made[id(parameter)] = torch.nn.Parameter(on_device(parameter), requires_grad=False)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = on_device(buffer)


@contextmanager
def real() -> Iterator[None]:
    """A block in which tensors are real, inside one in which they are fake."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def word_tokenizer(words: int = 512) -> Any:
    """A tokenizer of one token a word: `w`, `w0` to `w511` and those of a probe; other words are unknown."""
    from tokenizers import Tokenizer
    from tokenizers import models as tokenizer_models
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from pipeline.backbone.chat_template import PROBES

    probed = (word for probe in PROBES for word in probe.split())
    names = ["<unk>", "<end>", "w", *(f"w{number}" for number in range(words)), *probed]
    tokenizer = Tokenizer(
        tokenizer_models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
