"""The sections `backbone` and `generate` as work: the engine that they name, and a Generator around it.

Shared by the stage generate and by evaluations that ask the backbone.
"""

from typing import Any

from pipeline.backbone import BackboneParams, PromptFormatter, load_tokenizer
from pipeline.engines import build_engine, engine_facts
from pipeline.engines.base import Engine
from pipeline.generation import GenerateParams, Generator
from pipeline.shards import ShardStore


def answer_content(backbone: BackboneParams, params: GenerateParams) -> dict[str, Any]:
    """What decides an answer besides the backbone's weights and the prompt; serialises to JSON."""
    return {
        "generate": params.content(engine_facts(params.engine)),
        "chat_template_kwargs": backbone.chat_template_kwargs,
    }


def load_engine(backbone: BackboneParams, params: GenerateParams) -> Engine:
    """The engine of the params.

    Raises:
        EngineError: it cannot start.
    """
    return build_engine(
        params.engine,
        backbone,
        dtype=params.dtype,
        max_prompt_tokens=params.max_prompt_tokens,
        max_new_tokens=params.max_new_tokens,
        options=params.options,
        tensor_parallel=params.tensor_parallel,
        data_parallel=params.data_parallel,
        batch_invariant=params.batch_invariant,
    )


def make_generator(backbone: BackboneParams, params: GenerateParams, store: ShardStore) -> Generator:
    """The work of the params, its engine not loaded yet.

    Raises:
        BackboneError: the tokenizer cannot be used.
    """
    formatter = PromptFormatter(
        load_tokenizer(backbone),
        "chat",
        params.max_prompt_tokens,
        backbone.chat_template_kwargs,
        keep="end" if params.too_long == "keep_end" else "start",
    )
    return Generator(
        store=store,
        load_engine=lambda: load_engine(backbone, params),
        formatter=formatter,
        sampling=params.sampling,
        seed=params.seed,
        max_failed_fraction=params.max_failed_fraction,
        drop_too_long=params.too_long == "drop",
        strip_thinking=params.strip_thinking,
    )
