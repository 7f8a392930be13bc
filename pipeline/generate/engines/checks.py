"""What engines check before they start and before they take a prompt, and how they name what went wrong."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pipeline.backbone.loading import BackboneParams
from pipeline.core.config import Params, validate
from pipeline.core.errors import EngineError, ParamsError

M = TypeVar("M", bound=Params)


def parse_options(options: Mapping[str, Any], model: type[M]) -> M:
    """`generate.options` as an engine's own model.

    Raises:
        EngineError: with one line for each unknown, missing or mistyped option.
    """
    try:
        return validate(dict(options), model, where="generate.options")
    except ParamsError as error:
        raise EngineError(str(error)) from None


def context_length(backbone: BackboneParams, config: Any, max_prompt_tokens: int, max_new_tokens: int) -> int:
    """Positions that a prompt and its answer may take together.

    Raises:
        EngineError: more than the backbone has.
    """
    wanted = max_prompt_tokens + max_new_tokens
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and wanted > limit:
        raise EngineError(
            f"generate.max_prompt_tokens ({max_prompt_tokens}) + generate.max_new_tokens ({max_new_tokens}) = {wanted} "
            f"tokens, but backbone '{backbone.name}' has {limit} positions: lower one of them"
        )
    return wanted


def too_long(prompt_tokens: int, max_new_tokens: int, positions: int) -> str | None:
    """Why a prompt does not fit into `positions` with its answer, or None if it does."""
    if prompt_tokens + max_new_tokens <= positions:
        return None
    return f"prompt too long: {prompt_tokens} tokens + {max_new_tokens} new ones exceed {positions}"


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
