"""Any server that speaks OpenAI's protocol, on the network or on this machine.

An event loop in its own thread sends the requests; prompts are read and answers yielded in the caller's thread.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from functools import cached_property
from queue import SimpleQueue
from typing import Any, ClassVar, Self

from pipeline.backbone.chat_template import TODAY
from pipeline.backbone.loading import BackboneParams, load_tokenizer
from pipeline.core.errors import EngineError
from pipeline.core.schemas import FinishReason
from pipeline.generate.engines.base import Completion, EngineSetup, Prompt, Sampling
from pipeline.generate.engines.checks import parse_options
from pipeline.generate.engines.openai_client import (
    ROW_STATUSES,
    OpenAIOptions,
    Pace,
    answer_of,
    is_transient,
    limiter,
    make_client,
    read_secret,
    reason_of,
    valid_text,
    wait_seconds,
)

log = logging.getLogger(__name__)

NO_MODEL_LIST_STATUSES = frozenset({404, 405, 501})
FINISH_REASONS: Mapping[str | None, FinishReason] = {"stop": "stop", "length": "length"}


class OpenAIEngine:
    """Keeps `concurrency` requests in flight and yields each answer as it arrives."""

    VERSION: ClassVar[int] = 2
    SPEED_OPTIONS: ClassVar[frozenset[str]] = frozenset(OpenAIOptions.model_fields) - {"model", "api", "extra_body"}

    def __init__(self, backbone: BackboneParams, options: OpenAIOptions, *, max_model_len: int) -> None:
        """Connect, and send one short request to check that the server accepts this form.

        The server serves the backbone; only its tokenizer is used here. Raises EngineError if a package is missing, or
        the server cannot be reached, does not serve the model or refuses the request.
        """
        if options.api == "chat" and TODAY in backbone.chat_template_kwargs:
            message = f"chat, but {TODAY} in chat_template_kwargs does not reach the server: set completions"
            raise EngineError(message, argument="options.api")
        self._options = options
        self._secret = read_secret(self._options.api_key_env)
        self._client = make_client(self._options, self._secret)
        self._backbone = backbone
        self._model = self._options.model or backbone.name
        self._pace = Pace(
            limiter(self._options.requests_per_minute, 1), limiter(self._options.tokens_per_minute, max_model_len)
        )
        self._most_tokens = max_model_len
        self._in_flight: set[Future[Completion]] = set()
        self._failed_in_a_row = 0
        self._prompts_compared = False
        self._connect()

    @classmethod
    def load(cls, setup: EngineSetup) -> Self:
        return cls(setup.backbone, parse_options(setup.options, OpenAIOptions), max_model_len=setup.max_model_len)

    def generate(self, prompts: Iterable[Prompt], sampling: Sampling) -> Iterator[Completion]:
        waiting = iter(prompts)
        finished: SimpleQueue[Future[Completion]] = SimpleQueue()
        try:
            while True:
                while len(self._in_flight) < self._options.concurrency and (prompt := next(waiting, None)) is not None:
                    future = self._portal.start_task_soon(self._answer, prompt, sampling)
                    self._in_flight.add(future)
                    future.add_done_callback(finished.put)
                if not self._in_flight:
                    return
                future = finished.get()
                self._in_flight.discard(future)
                yield future.result()
        finally:
            self._cancel()

    def close(self) -> None:
        self._cancel()
        self._resources.close()

    def _cancel(self) -> None:
        while self._in_flight:
            self._in_flight.pop().cancel()

    # --- start ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        from anyio.from_thread import start_blocking_portal

        with ExitStack() as started:
            self._portal = started.enter_context(start_blocking_portal())
            started.callback(self._portal.call, self._client.close)
            self._portal.call(self._check_model)
            self._portal.call(self._check_request)
            self._resources = started.pop_all()
        log.info("engine openai: '%s' at %s, api %s", self._model, self._options.base_url, self._options.api)

    async def _check_model(self) -> None:
        import openai

        try:
            served = [model.id async for model in self._client.models.list()]
        except openai.APIStatusError as error:
            if error.status_code not in NO_MODEL_LIST_STATUSES:
                raise self._broken(error) from None
            log.info("engine openai: the server lists no models (HTTP %d)", error.status_code)
            return
        except openai.APIConnectionError as error:
            raise self._broken(error) from None
        except (AttributeError, TypeError, openai.APIError):
            log.info("engine openai: the server's list of models cannot be read")
            return
        if self._model not in served:
            listed = ", ".join(sorted(served)[:10]) or "nothing"
            listed += f" and {len(served) - 10} more" if len(served) > 10 else ""
            message = f"{self._options.base_url} does not serve '{self._model}' (it serves: {listed})"
            raise EngineError(message, argument="options.model")

    async def _check_request(self) -> None:
        import openai

        try:
            response = await self._request(Prompt("check", [1], 0, "Hello"), Sampling(max_new_tokens=1))
        except (openai.APIError, json.JSONDecodeError) as error:
            raise self._broken(error) from None
        if not getattr(response, "choices", None):
            message = f"{self._options.base_url} answers, but not in OpenAI's protocol"
            raise EngineError(message, argument="options.base_url")

    # --- one row ----------------------------------------------------------------------------------------------------

    async def _answer(self, prompt: Prompt, sampling: Sampling) -> Completion:
        import openai

        try:
            response = await self._with_retries(prompt, sampling)
        except (openai.APIError, json.JSONDecodeError) as error:
            return self._failed(prompt, error)
        self._failed_in_a_row = 0
        return self._completion(prompt, response)

    async def _with_retries(self, prompt: Prompt, sampling: Sampling) -> Any:
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

        stop = stop_after_attempt(self._options.attempts)
        retrying = AsyncRetrying(stop=stop, wait=wait_seconds, retry=retry_if_exception(is_transient), reraise=True)
        return await retrying(self._paced_request, prompt, sampling)

    async def _paced_request(self, prompt: Prompt, sampling: Sampling) -> Any:
        await self._pace.wait(min(len(prompt.token_ids) + sampling.max_new_tokens, self._most_tokens))
        return await self._request(prompt, sampling)

    async def _request(self, prompt: Prompt, sampling: Sampling) -> Any:
        arguments: dict[str, Any] = {
            "model": self._model,
            "extra_body": dict(self._options.extra_body),
            **sampling.arguments(prompt.seed),
        }
        if self._options.api == "completions":
            return await self._client.completions.create(prompt=prompt.token_ids, **arguments)
        if kwargs := self._backbone.chat_template_kwargs:
            arguments["extra_body"] = {"chat_template_kwargs": kwargs} | arguments["extra_body"]
        turns = {} if prompt.system is None else {"system": prompt.system}
        messages: Any = [
            {"role": role, "content": content} for role, content in (turns | {"user": prompt.text}).items()
        ]
        return await self._client.chat.completions.create(messages=messages, **arguments)

    def _completion(self, prompt: Prompt, response: Any) -> Completion:
        choices = getattr(response, "choices", None)
        if not choices:
            return Completion.failed(prompt.id, "no answer in the server's response")
        text = valid_text(
            choices[0].text or "" if self._options.api == "completions" else answer_of(choices[0].message)
        )
        reason = FINISH_REASONS.get(choices[0].finish_reason)
        if reason is None:
            return Completion.failed(prompt.id, f"the server finished it with '{choices[0].finish_reason}'")
        if response.usage is None:
            tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            return Completion(prompt.id, text, reason, len(tokens))
        self._compare_prompts(len(prompt.token_ids), response.usage.prompt_tokens)
        return Completion(prompt.id, text, reason, response.usage.completion_tokens)

    @cached_property
    def _tokenizer(self) -> Any:
        log.info("engine openai: the server reports no usage: tokens are counted with the backbone's tokenizer")
        return load_tokenizer(self._backbone)

    def _compare_prompts(self, ours: int, theirs: int) -> None:
        if not self._prompts_compared and ours != theirs:
            log.warning(
                "engine openai: the server's prompt has %d tokens, the backbone's own %d: its chat template or model "
                "differs (options.api: completions sends our tokens)", theirs, ours,
            )  # fmt: skip
        self._prompts_compared = True

    # --- failures ---------------------------------------------------------------------------------------------------

    def _failed(self, prompt: Prompt, error: Exception) -> Completion:
        """A failure that concerns this row alone; raises EngineError if it concerns every row."""
        if is_transient(error):
            self._failed_in_a_row += 1
            if self._failed_in_a_row > 2 * self._options.concurrency:
                raise self._broken(error, f"{self._failed_in_a_row} rows failed in a row, ") from None
        elif getattr(error, "status_code", None) not in ROW_STATUSES:
            raise self._broken(error) from None
        return Completion.failed(prompt.id, valid_text(self._secret.cleared(reason_of(error))))

    def _broken(self, error: Exception, what: str = "") -> EngineError:
        argument, hint = "base_url", ""
        match getattr(error, "status_code", 0):
            case 401 | 403:
                argument, hint = "api_key_env", f"; the key is environment variable {self._options.api_key_env}"
            case 404:
                hint = "; check it (with its /v1) and options.model"
        reason = self._secret.cleared(f"{what}{reason_of(error)}")
        message = f"the endpoint {self._options.base_url} cannot be used: {reason}{hint}"
        return EngineError(message, argument=f"options.{argument}")
