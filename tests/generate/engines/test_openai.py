"""An endpoint as engine, against a server with faults (fast) and (marker models) against `vllm serve`."""

import asyncio
import json
import logging
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.backbone.loading import BackboneParams
from pipeline.core.errors import EngineError
from pipeline.core.paths import RESPONSES_DIR
from pipeline.generate.__main__ import app
from pipeline.generate.engines import openai_client
from pipeline.generate.engines.base import Completion, EngineSetup, Prompt, Sampling
from pipeline.generate.engines.openai import OpenAIEngine
from pipeline.generate.engines.registry import build_engine
from pipeline.generate.response_counts import failures
from tests.generate.engines.conftest import GREEDY, SIZES, agree
from tests.generate.engines.fake_endpoint import FakeEndpoint, Fault
from tests.stage_runs import folder_bytes, kept_rows, killed, write_params, write_queries
from tests.vllm_server import vllm_serve

SAMPLING = Sampling(max_new_tokens=8)
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def server() -> Iterator[FakeEndpoint]:
    with FakeEndpoint().serving() as fake:
        yield fake


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def engine(server: FakeEndpoint, chat_template_kwargs: dict[str, Any] | None = None, **options: Any) -> OpenAIEngine:
    backbone = BackboneParams(name="org/model", chat_template_kwargs=chat_template_kwargs or {})
    return OpenAIEngine.load(EngineSetup(backbone, 40, {"base_url": server.url} | options))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"q{index}", [5, 6, index], 100 + index, f"question {index}") for index in range(count)]


def answers(server: FakeEndpoint, count: int, sampling: Sampling = SAMPLING, **options: Any) -> dict[str, Completion]:
    with closing(engine(server, **options)) as loaded:
        found = list(loaded.generate(iter(prompts(count)), sampling))
    assert len(found) == len({completion.id for completion in found})
    return {completion.id: completion for completion in found}


def refused(status: int, message: str, **headers: str) -> Fault:
    return status, headers, {"error": {"message": message, "type": "x", "code": None}}


def only(text: str, fault: Fault, times: int = 10**6) -> Callable[[str, int], Fault | None]:
    """The fault for this text, the first `times` times."""
    return lambda asked, count: fault if asked == text and count <= times else None


# --- answers --------------------------------------------------------------------------------------------------------


def test_one_answer_a_prompt_by_chat(server: FakeEndpoint) -> None:
    found = answers(server, 5, chat_template_kwargs={"enable_thinking": False})
    expected = {f"q{i}": Completion(f"q{i}", f"answer: question {i}", "stop", 18) for i in range(5)}
    assert found == expected
    request = server.asked()[0]
    assert request["path"] == "/v1/chat/completions"
    assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("org/model", 8, 0.0)
    assert "seed" not in request


def test_chat_sends_the_system_turn(server: FakeEndpoint) -> None:
    with closing(engine(server)) as loaded:
        list(loaded.generate([Prompt("a", [1], 0, "why?", "Be brief.")], SAMPLING))
    [request] = server.asked()
    assert request["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]


def test_completions_sends_our_tokens_and_a_seed_of_each_row(server: FakeEndpoint) -> None:
    found = answers(server, 3, Sampling(8, temperature=0.7, top_p=0.9), api="completions", extra_body={"top_k": 5})
    assert found["q2"].text == "answer: [5, 6, 2]"
    sent = {request["prompt"][2]: request for request in server.asked()}
    assert [sent[index]["seed"] for index in range(3)] == [100, 101, 102]
    assert (sent[0]["path"], sent[0]["top_p"], sent[0]["top_k"]) == ("/v1/completions", 0.9, 5)


def test_length_and_stranger_finishes(server: FakeEndpoint) -> None:
    server.finish_reason = "length"
    assert answers(server, 1)["q0"].finish_reason == "length"
    server.finish_reason = "content_filter"
    assert answers(server, 1)["q0"].error == "the server finished it with 'content_filter'"


def test_without_usage_the_tokenizer_counts(server: FakeEndpoint, tiny_backbone: Callable[..., Path]) -> None:
    server.usage, server.models = False, None
    backbone = BackboneParams(name=str(tiny_backbone()))
    with closing(OpenAIEngine.load(EngineSetup(backbone, 40, {"base_url": server.url}))) as loaded:
        [found] = loaded.generate(prompts(1), SAMPLING)
    assert found.response_tokens == len("answer: question 0")  # its tokens are bytes


def test_a_server_with_another_template_is_noticed_once(server: FakeEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    with closing(engine(server)) as loaded:
        list(loaded.generate([Prompt("a", [1] * 9, 0, "a"), Prompt("b", [1] * 9, 0, "b")], SAMPLING))
    assert caplog.text.count("the server's prompt has 3 tokens, the backbone's own 9") == 1
    caplog.clear()
    answers(server, 1)
    assert "template" not in caplog.text


# --- the window -----------------------------------------------------------------------------------------------------


def test_never_more_prompts_in_flight_or_pulled_than_asked_for(server: FakeEndpoint) -> None:
    server.delay = 0.02
    pulled = 0

    def counted() -> Iterator[Prompt]:
        nonlocal pulled
        for prompt in prompts(30):
            pulled += 1
            yield prompt

    with closing(engine(server, concurrency=4)) as loaded:
        for done, _ in enumerate(loaded.generate(counted(), SAMPLING)):
            assert pulled <= done + 4
    assert pulled == 30
    assert 2 <= server.most_running <= 4


def test_closing_in_the_middle_gives_up_what_is_in_flight(server: FakeEndpoint) -> None:
    release = Event()

    def held(text: str, count: int) -> None:
        if text != "question 0":
            release.wait(60)

    server.fault = held
    with closing(engine(server, concurrency=4)) as loaded:
        stream = loaded.generate(iter(prompts(100)), SAMPLING)
        assert next(stream).id == "q0"
        began = time.monotonic()
    assert time.monotonic() - began < 30
    release.set()
    assert len(server.asked()) <= 5


def test_an_abandoned_call_leaves_the_engine_usable(server: FakeEndpoint) -> None:
    with closing(engine(server, concurrency=4)) as loaded:
        stream = loaded.generate(iter(prompts(100)), SAMPLING)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert {completion.id for completion in loaded.generate(prompts(6), SAMPLING)} == {f"q{i}" for i in range(6)}


class Warped(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer instead of waiting for it."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            # A little more each time, as a real clock: a timer for less than a float's step would never be reached.
            self.now = max(self.now, self._scheduled[0].when()) + 1e-6  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def paced(requests: float | None, tokens: float | None, costs: list[int]) -> float:
    """Seconds by the loop's clock until requests of these costs may all start, 40 tokens being the largest."""

    async def run() -> float:
        pace = openai_client.Pace(openai_client.limiter(requests, 1), openai_client.limiter(tokens, 40))
        await asyncio.gather(*(pace.wait(cost) for cost in costs))
        return loop.time()

    loop = Warped()
    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


def test_requests_start_evenly_at_their_rate() -> None:
    assert paced(60, None, [1] * 10) == pytest.approx(9, abs=0.01)
    assert paced(600, None, [1] * 10) == pytest.approx(0.9, abs=0.01)


def test_tokens_flow_at_their_rate() -> None:
    assert paced(None, 60, [40] * 4) == pytest.approx(3 * 40, abs=0.01)
    assert paced(None, 60, [20] * 4) == pytest.approx(2 * 20, abs=0.01)  # two may come at once
    assert paced(None, None, [40] * 1000) == 0


def test_the_rate_limit_reaches_the_server(server: FakeEndpoint) -> None:
    began = time.monotonic()
    answers(server, 5, requests_per_minute=600)
    assert time.monotonic() - began > 0.4


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_passing_failures_are_tried_again(server: FakeEndpoint, status: int) -> None:
    server.fault = only("question 1", refused(status, "later"), times=2)
    assert {completion.finish_reason for completion in answers(server, 3).values()} == {"stop"}
    assert (server.times["question 0"], server.times["question 1"]) == (1, 3)


def test_the_server_says_when_to_come_back(server: FakeEndpoint) -> None:
    server.fault = only("question 0", refused(429, "slow down", **{"Retry-After": "0.5"}), times=1)
    began = time.monotonic()
    assert answers(server, 1)["q0"].finish_reason == "stop"
    assert time.monotonic() - began > 0.5


def test_retry_after_as_number_date_and_nonsense() -> None:
    class Said(Exception):
        def __init__(self, header: str | None) -> None:
            self.response = type("R", (), {"headers": {"retry-after": header} if header else {}})()

    assert openai_client.retry_after(Said("1.5")) == 1.5
    assert openai_client.retry_after(Said("Wed, 21 Oct 2015 07:28:00 GMT")) == 0
    assert openai_client.retry_after(Said("Wed, 21 Oct 2099 07:28:00 GMT")) > 10**6  # type: ignore[operator]
    assert openai_client.retry_after(Said("soon")) is None
    assert openai_client.retry_after(Said(None)) is None
    assert openai_client.retry_after(ValueError()) is None


@contextmanager
def faulty_after_the_check(server: FakeEndpoint, fault: Callable[[str, int], Fault | None]) -> Iterator[OpenAIEngine]:
    """An engine of three attempts whose check at the start is answered."""
    with closing(engine(server, attempts=3)) as loaded:
        server.fault = fault
        yield loaded


def test_a_wait_for_a_day_is_capped_and_said(
    server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    openai_client._warn_of_cap.cache_clear()
    monkeypatch.setattr(openai_client, "LONGEST_ASKED_SECONDS", 0.05)
    tomorrow = refused(429, "come back tomorrow", **{"Retry-After": "86400"})
    with faulty_after_the_check(server, lambda text, count: tomorrow) as loaded:
        [found] = loaded.generate(prompts(1), SAMPLING)
    assert found.error == "HTTP 429: come back tomorrow"
    assert server.times["question 0"] == 3
    assert caplog.text.count("asks to wait longer than") == 1


def said(finish_reason: str = "stop", **message: Any) -> Callable[[str, int], Fault]:
    """An answer of the server with these fields of its message."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", **message}}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "org/model", "choices": [choice]}
    return lambda text, count: (200, {}, body | {"usage": usage})


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None, "refusal": "I cannot help with that."}, "I cannot help with that."),
        ({"content": "Four.", "refusal": None, "reasoning_content": None}, "Four."),
        ({"content": "Four.", "reasoning_content": "hm, two"}, "<think>\nhm, two\n</think>\n\nFour."),
        ({"content": "Four.", "reasoning": "hm, two"}, "<think>\nhm, two\n</think>\n\nFour."),
        ({"content": None, "reasoning_content": "hm, two"}, "<think>\nhm, two"),
        ({"content": None}, ""),
    ],
)
def test_fields_that_servers_put_beside_the_content(server: FakeEndpoint, message: dict[str, Any], text: str) -> None:
    server.fault = said(**message)
    found = answers(server, 1)["q0"]
    assert (found.text, found.finish_reason) == (text, "stop")


def test_a_run_of_thoughts_without_answers_does_not_end_green(
    server: FakeEndpoint, workspace: Path, tiny_backbone: Callable[..., Path]
) -> None:
    server.fault = said("length", content=None, reasoning_content="Okay, the user asks")
    write_queries(TEXTS[:20])
    configure(server, tiny_backbone())
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "generate.gates.empty: 1 of the answers are empty" in result.stderr
    assert not RESPONSES_DIR.exists()
    counts = json.loads(Path("results/generate.json").read_text())["counts"]
    assert (counts["empty_responses"], counts["stripped_thinking"]) == (20, 20)


def test_a_date_that_does_not_reach_the_server_is_refused(server: FakeEndpoint) -> None:
    fixed = {"strftime_now": "2026-11-29"}
    with pytest.raises(EngineError, match=r"options\.api: chat, but strftime_now .* set completions"):
        engine(server, chat_template_kwargs=fixed)
    engine(server, chat_template_kwargs=fixed, api="completions").close()


def test_a_row_fails_alone_with_its_reason(server: FakeEndpoint) -> None:
    faults = {
        "question 1": refused(400, "maximum context length is 8 tokens\nsee docs"),
        "question 2": (400, {}, {"error": {"message": "no", "code": "content_filter"}}),
        "question 3": refused(500, "it crashed"),
    }
    server.fault = lambda text, count: faults.get(text)
    found = answers(server, 6, attempts=3)
    assert sorted(row for row, completion in found.items() if completion.finish_reason == "error") == ["q1", "q2", "q3"]
    assert found["q1"].error == "HTTP 400: maximum context length is 8 tokens"
    assert found["q2"].error == "HTTP 400 content_filter: no"
    assert found["q3"].error == "HTTP 500: it crashed"
    assert [server.times[f"question {i}"] for i in (1, 2, 3)] == [1, 1, 3]
    kinds = failures([{"error": c.error} for c in found.values() if c.error])
    assert kinds == {"HTTP 400": 1, "HTTP 400 content_filter": 1, "HTTP 500": 1}


def test_a_reply_that_breaks_off_is_tried_again_and_then_fails_alone(server: FakeEndpoint) -> None:
    broken: Fault = (200, {}, b'{"id": "x", "choices": [{"ind')
    server.fault = lambda text, count: broken if text == "question 1" or (text == "question 2" and count == 1) else None
    found = answers(server, 3, attempts=3)
    assert [found[f"q{i}"].finish_reason for i in range(3)] == ["stop", "error", "stop"]
    assert "JSONDecodeError" in (found["q1"].error or "")
    assert [server.times[f"question {i}"] for i in range(3)] == [1, 3, 2]


def test_half_an_emoji_does_not_reach_the_store(server: FakeEndpoint) -> None:
    def fault(text: str, count: int) -> Fault | None:
        status, headers, body = 200, {}, server._body("/v1/chat/completions", "cut \ud83d")
        return (status, headers, body) if text == "question 1" else None

    server.fault = fault
    found = answers(server, 2)
    assert found["q1"].text == "cut \N{REPLACEMENT CHARACTER}"
    assert found["q0"].text == "answer: question 0"


def test_a_row_that_takes_too_long_fails_alone(server: FakeEndpoint) -> None:
    def slow(text: str, count: int) -> Fault | None:
        if text == "question 1":
            time.sleep(2)
        return None

    server.fault = slow
    found = answers(server, 3, timeout_seconds=1, attempts=2)
    assert found["q0"].finish_reason == found["q2"].finish_reason == "stop"
    assert str(found["q1"].error).startswith("APITimeoutError: ")
    assert server.times["question 1"] == 2


def stops(server: FakeEndpoint, message: str, count: int = 50, **options: Any) -> None:
    with closing(engine(server, concurrency=4, **options)) as loaded, pytest.raises(EngineError, match=message):
        list(loaded.generate(iter(prompts(count)), SAMPLING))


@pytest.mark.parametrize(("status", "option"), [(401, "api_key_env"), (403, "api_key_env"), (404, "base_url")])
def test_a_failure_of_every_row_stops_at_once(server: FakeEndpoint, status: int, option: str) -> None:
    server.fault = lambda text, count: refused(status, "go away") if text == "question 9" else None
    stops(server, rf"^options\.{option}: .*{server.url} cannot be used: HTTP {status}: go away;")
    assert len(server.asked()) <= 9 + 2 * 4


def test_a_server_that_breaks_down_stops_the_run(server: FakeEndpoint) -> None:
    server.fault = lambda text, count: None if text in ("Hello", "question 0") else refused(503, "overloaded")
    stops(server, "9 rows failed in a row, HTTP 503: overloaded", attempts=1)
    assert len(server.asked()) < 40


def test_a_server_that_goes_away_stops_the_run() -> None:
    with FakeEndpoint().serving() as server:
        loaded = engine(server, concurrency=2, attempts=2)
    with closing(loaded), pytest.raises(EngineError, match=r"^options\.base_url: .*5 rows failed .*APIConnectionError"):
        list(loaded.generate(iter(prompts(50)), SAMPLING))


# --- start ----------------------------------------------------------------------------------------------------------


def cannot_start(server: FakeEndpoint, message: str, **options: Any) -> None:
    with pytest.raises(EngineError, match=message):
        engine(server, **options)


def test_no_server_names_its_url() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    cannot_start(FakeEndpoint(url=url), rf"^options\.base_url: .*{url} cannot be used: APIConnectionError")


def test_a_model_that_is_not_served_is_named_with_those_that_are(server: FakeEndpoint) -> None:
    server.models = ["b/other", "a/other"]
    cannot_start(server, r"^options\.model: .* does not serve 'org/model' \(it serves: a/other, b/other\)")
    with closing(engine(server, model="b/other")):
        assert server.requests[0]["model"] == "b/other"


def test_a_server_without_a_list_of_models_is_used(server: FakeEndpoint, caplog: pytest.LogCaptureFixture) -> None:
    server.models = None
    with caplog.at_level(logging.INFO):
        assert len(answers(server, 2)) == 2
    assert "the server lists no models (HTTP 404)" in caplog.text


def test_a_request_that_is_refused_for_every_row_is_refused_at_the_start(server: FakeEndpoint) -> None:
    server.fault = lambda text, count: refused(400, "unknown field chat_template_kwargs")
    cannot_start(server, "HTTP 400: unknown field chat_template_kwargs")


def test_a_page_that_is_no_endpoint(server: FakeEndpoint) -> None:
    server.fault = lambda text, count: (200, {}, {"hello": "world"})
    cannot_start(server, "answers, but not in OpenAI's protocol")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurency": 3}, r"^options: concurency: unknown key \(did you mean 'concurrency'\?\)"),
        ({"concurrency": "3"}, r"^options: concurrency: .*integer"),
        ({"api": "responses"}, r"^options: api: "),
        ({"base_url": "localhost:8000"}, r"base_url: .*must be a URL with http:// or https://"),
        ({"base_url": "http://me:word@host/v1"}, r"base_url: .*must hold no user name or password"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, r"^options\.api_key_env: .*NOT_SET_ANYWHERE"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    cannot_start(FakeEndpoint(url="http://127.0.0.1:1/v1"), message, **options)


def test_a_missing_package_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenacity", None)
    cannot_start(FakeEndpoint(url="http://127.0.0.1:1/v1"), r"it comes with `pip install -e \.`")


def test_the_servers_address_and_speed_change_no_fingerprint() -> None:
    assert {
        "api_key_env", "attempts", "base_url", "concurrency", "requests_per_minute", "timeout_seconds",
        "tokens_per_minute",
    } == OpenAIEngine.SPEED_OPTIONS  # fmt: skip


# --- the key --------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shows_up_nowhere(
    server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.fault = only("question 1", refused(400, f"no credit left for {KEY}"))
    with caplog.at_level(logging.DEBUG), closing(engine(server)) as loaded:
        found = list(loaded.generate(prompts(3), SAMPLING))
        server.fault = lambda text, count: refused(401, f"Incorrect API key provided: {KEY}")
        with pytest.raises(EngineError) as caught:
            list(loaded.generate(prompts(3), SAMPLING))
        shown = [repr(vars(loaded)), repr(found), str(caught.getrepr(chain=True)), caplog.text]
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert "Incorrect API key provided: ***" in str(caught.value)
    assert [KEY in text for text in shown] == [False] * 4


def test_another_variable_and_none(server: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(server, 1)
    assert KEY not in str(server.keys)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    server.keys.clear()
    answers(server, 1, api_key_env="MY_KEY")
    assert set(server.keys) == {f"Bearer {KEY}"}


# --- the stage ------------------------------------------------------------------------------------------------------

TEXTS = [f"question number {index}" for index in range(700)]


def configure(server: FakeEndpoint, backbone: Path, **options: Any) -> None:
    options = {"base_url": server.url, "model": "org/model", "concurrency": 8} | options
    sizes = {"max_new_tokens": 8, "max_prompt_tokens": 40}
    write_params(
        backbone={"name": str(backbone), "dtype": "float32"},
        generate={"engine": "openai", "dtype": "float32", "options": options} | sizes,
    )


@pytest.mark.slow
def test_the_stage_killed_and_run_again(
    server: FakeEndpoint, workspace: Path, tiny_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    write_queries(TEXTS)
    configure(server, tiny_backbone())
    monkeypatch.setenv("PIPELINE_WORK_DIR", "elsewhere")
    assert CliRunner().invoke(app, []).exit_code == 0
    uninterrupted = folder_bytes(RESPONSES_DIR)
    monkeypatch.delenv("PIPELINE_WORK_DIR")

    server.delay = 0.05
    killed("generate", "row_store.committed:1", monkeypatch)
    kept = kept_rows("generate")
    assert 0 < kept < len(TEXTS)
    server.delay = 0
    before = sum(server.times.values())
    configure(server, tiny_backbone(), concurrency=16)
    assert CliRunner().invoke(app, []).exit_code == 0
    assert folder_bytes(RESPONSES_DIR) == uninterrupted
    assert sum(server.times.values()) - before == len(TEXTS) - kept + 1
    assert not [path for path in workspace.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_server_beside_transformers(
    small_lm: Path, questions: list[Prompt], by_transformers: dict[str, Completion],
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pytest.importorskip("vllm")
    long = Prompt("long", [100] * 200, 0, "word " * 200)
    found = {}
    served = ("--max-model-len", "128", "--generation-config", "vllm")
    with vllm_serve(small_lm, tmp_path / "server.log", *served) as url:
        for api in ("completions", "chat"):
            options = {"base_url": url, "model": "small", "api": api, "concurrency": 4}
            backbone = BackboneParams(name=str(small_lm))
            with closing(build_engine("openai", backbone, **SIZES, options=options)) as loaded:
                found[api] = {answer.id: answer for answer in loaded.generate([long, *questions], GREEDY)}
    assert "template" not in caplog.text  # its prompts are as long as ours
    for answered in found.values():
        failed = answered.pop("long")
        assert failed.finish_reason == "error"
        assert "maximum context length" in str(failed.error)
        assert agree(answered, by_transformers)
    assert found["chat"] == found["completions"]
