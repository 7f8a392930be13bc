"""Client of an OpenAI endpoint: options, key, rate limits, which failures are retried, and their descriptions.

The key comes from an environment variable and goes into the request only: it is removed from a server's message
before that is logged, raised or stored.
"""

import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from time import time
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from pipeline.core.config import Params
from pipeline.core.errors import EngineError, describe
from pipeline.generate.response_text import thinking

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter
    from openai import AsyncOpenAI
    from tenacity import RetryCallState

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
# The first wait before a retry, and the longest unless the server asks for more.
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
# The longest wait that a server may ask for: some name the end of a daily quota.
LONGEST_ASKED_SECONDS = 600.0
# Statuses that concern one request; all other permanent failures concern every row.
ROW_STATUSES = frozenset({400, 413, 422})
TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})


class OpenAIOptions(Params):
    """Options of this engine."""

    base_url: str = Field(description="with the version, e.g. http://127.0.0.1:8000/v1")
    model: str | None = Field(default=None, description="the server's name of the model; null = backbone.name")
    api: Literal["chat", "completions"] = Field(
        default="chat", description="chat: the server applies its template; completions: our own token ids"
    )
    extra_body: dict[str, Any] = Field(default_factory=dict, description="further fields of every request")
    concurrency: int = Field(default=64, ge=1, le=1000, description="requests in flight")
    requests_per_minute: float | None = Field(default=None, gt=0, description="null = no limit")
    tokens_per_minute: float | None = Field(
        default=None, gt=0, description="prompt and max_new_tokens; null = no limit"
    )
    timeout_seconds: float = Field(default=600.0, gt=0, description="of one attempt")
    attempts: int = Field(default=6, ge=1, description="for a row, while its failures look temporary")
    api_key_env: str = Field(default=KEY_VARIABLE, description="environment variable that holds the key")

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be a URL with http:// or https://")
        if parts.username or parts.password:
            raise ValueError("must hold no user name or password: put the key into the environment")
        return url


@dataclass(frozen=True)
class Secret:
    """A key that its `repr` hides; `cleared` removes it from a text."""

    _value: str

    def cleared(self, text: str) -> str:
        return text.replace(self._value, "***") if self._value else text

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"


@dataclass(frozen=True)
class Pace:
    """Rate limits: requests and tokens a minute."""

    requests: "AsyncLimiter | None"
    tokens: "AsyncLimiter | None"

    async def wait(self, tokens: int) -> None:
        """Wait until a request of `tokens` tokens may start."""
        if self.requests:
            await self.requests.acquire()
        if self.tokens:
            await self.tokens.acquire(tokens)


def limiter(per_minute: float | None, largest: int) -> "AsyncLimiter | None":
    """A limiter of `per_minute` units that spreads them evenly; `largest` units may come at once."""
    from aiolimiter import AsyncLimiter

    return AsyncLimiter(largest, 60 * largest / per_minute) if per_minute else None


def read_secret(variable: str) -> Secret:
    """The key in the environment, empty if the default variable is not set; raises EngineError for any other."""
    value = os.environ.get(variable, "").strip()
    if not value and variable != KEY_VARIABLE:
        raise EngineError(f"environment variable {variable} is not set", argument="options.api_key_env")
    return Secret(value)


def make_client(options: OpenAIOptions, secret: Secret) -> "AsyncOpenAI":
    """A client without retries, which the engine does itself; raises EngineError if a package is missing."""
    try:
        import aiolimiter  # noqa: F401
        import tenacity  # noqa: F401
        from openai import AsyncOpenAI
    except ImportError as error:
        message = f"openai needs a package ({describe(error)}): it comes with `pip install -e .`"
        raise EngineError(message, argument="engine") from None
    return AsyncOpenAI(
        base_url=options.base_url,
        api_key=secret.reveal() or "none",
        timeout=options.timeout_seconds,
        max_retries=0,
    )


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    import openai

    if isinstance(error, json.JSONDecodeError):  # a truncated reply
        return True
    if isinstance(error, openai.APIStatusError):
        return error.status_code in TRANSIENT_STATUSES or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)


def wait_seconds(state: "RetryCallState") -> float:
    """The server's `Retry-After`; else doubling waits with jitter, so that rows do not return together."""
    from tenacity import wait_exponential, wait_random

    asked = retry_after(state.outcome.exception() if state.outcome else None)
    if asked is not None:
        if asked > LONGEST_ASKED_SECONDS:
            _warn_of_cap()
        return min(asked, LONGEST_ASKED_SECONDS)
    doubling = wait_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS)
    return float((doubling + wait_random(0, FIRST_WAIT_SECONDS))(state))


@cache
def _warn_of_cap() -> None:
    log.warning(
        "engine openai: the server asks to wait longer than %.0f s before a retry (Retry-After); rows wait no longer, "
        "and fail when their attempts are used up",
        LONGEST_ASKED_SECONDS,
    )


def retry_after(error: BaseException | None) -> float | None:
    """Seconds of the server's `Retry-After`, given as a number or as a date."""
    header = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
    if header is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(header))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    return None


def valid_text(text: str) -> str:
    """Text that UTF-8 can hold: half surrogate pairs, from servers that cut within an emoji, become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def answer_of(message: Any) -> str:
    """The text of a chat message: its refusal where it has no content, behind the thinking that the server split off.

    Servers name thinking `reasoning_content` or `reasoning`. Without content the answer ended within it.
    """
    content = message.content if message.content is not None else getattr(message, "refusal", None)
    reasoning = getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None)
    if isinstance(reasoning, str) and reasoning.strip():
        return thinking(reasoning, content)
    return content or ""


def reason_of(error: Exception) -> str:
    """A failure as `kind: message`."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        cause = f" ({describe(error.__cause__)})" if error.__cause__ else ""
        return f"{describe(error)}{cause}"
    code = f" {error.code}" if isinstance(error.code, str) and error.code else ""
    body = error.body.get("message") if isinstance(error.body, dict) else None
    lines = str(body or error.message).strip().splitlines() or [""]
    return f"HTTP {error.status_code}{code}: {lines[0][:500]}"
