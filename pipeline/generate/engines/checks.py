"""Checks before an engine starts and before it takes a prompt."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pipeline.backbone.loading import BackboneParams
from pipeline.core.config import Params, validate
from pipeline.core.errors import EngineError, ParamsError
from pipeline.generate.engines.base import Completion, Prompt

M = TypeVar("M", bound=Params)


def parse_options(options: Mapping[str, Any], model: type[M]) -> M:
    """Options as an engine's own model; raises EngineError with a line for each mistake."""
    try:
        return validate(dict(options), model)
    except ParamsError as error:
        raise EngineError(str(error), argument="options") from None


def context_length(backbone: BackboneParams, config: Any, max_prompt_tokens: int, max_new_tokens: int) -> int:
    """Positions of a prompt and its answer together; raises EngineError if the backbone has fewer."""
    wanted = max_prompt_tokens + max_new_tokens
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        sum_ = f"{max_prompt_tokens} + max_new_tokens ({max_new_tokens}) = {wanted} tokens"
        message = f"{sum_}, but backbone '{backbone.name}' has {limit} positions: lower one of them"
        raise EngineError(message, argument="max_prompt_tokens")
    return wanted


def too_long(prompt_tokens: int, max_new_tokens: int, positions: int) -> str | None:
    """Why a prompt does not fit into `positions` with its answer, or None if it does."""
    if prompt_tokens + max_new_tokens <= positions:
        return None
    return f"prompt too long: {prompt_tokens} tokens + {max_new_tokens} new ones exceed {positions}"


def split_fitting(
    prompts: Iterable[Prompt], max_new_tokens: int, positions: int
) -> tuple[list[Prompt], list[Completion]]:
    """The prompts that fit into `positions` with their answers, and the failures of the others."""
    fitting, refused = list[Prompt](), list[Completion]()
    for prompt in prompts:
        if reason := too_long(len(prompt.token_ids), max_new_tokens, positions):
            refused.append(Completion.failed(prompt.id, reason))
        else:
            fitting.append(prompt)
    return fitting, refused


def stop_tokens(*eos: int | list[int] | None) -> list[int]:
    """Every token that one of these EOS settings names, ascending."""
    named = [token for setting in eos for token in (setting if isinstance(setting, list) else [setting])]
    return sorted({token for token in named if token is not None})
