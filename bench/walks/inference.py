"""Uses of a model without gradients on the fake GPU: the student reads, teachers embed, heads and decoding.

Each way is a function that is called twice; the second call is counted. Texts have two lengths, so that batches pad.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from bench.common import TEACHER
from bench.fake_gpu import models
from bench.fake_gpu.meter import Meter
from bench.fake_gpu.simulation import ANSWER_TOKENS, simulated

COMPRESSION_TOKENS = 10
INSTRUCTION = "Generate a passage that best answers this question:"
MODES = ("read", "embed", "head")

Ways = Iterator[tuple[str, Callable[[], object]]]


def walk(mode_name: str, config: Any, mode: Any, *, rows: int, length: int) -> Iterator[dict[str, Any]]:
    """The numbers of each way of a mode, for `rows` texts of at most `length` tokens."""
    model, meter = models.fake_model(config, mode), Meter()
    texts = [" ".join([f"w{row}", *["w"] * (length // (1 + row % 2) - 1)]) for row in range(rows)]
    with simulated(mode, meter):
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        for name, use in {"read": _reading, "embed": _teachers, "head": _heads}[mode_name](model, texts, length, mode):
            for _ in range(2):
                meter.reset()
                use()
            yield {"way": name, **meter.summary()}


def _encoder(model: Any, length: int) -> Any:
    """An encoder with an untrained student."""
    from pipeline.encoder.folder.config import EncoderConfig
    from pipeline.encoder.inference import Encoder
    from pipeline.encoder.student import new_student

    hidden = model.config.hidden_size
    student = new_student(model, hidden, compression_tokens=COMPRESSION_TOKENS, thought_tokens=2, seed=0)
    config = EncoderConfig(
        backbone={"name": "fake"},
        chat_template_kwargs={},
        template="raw",
        max_query_tokens=length + 16,
        compression_tokens=COMPRESSION_TOKENS,
        thought_tokens=2,
        hidden=hidden,
        width=hidden,
        teacher={},
    )
    return Encoder(model, models.word_tokenizer(), student, config, {})


def _reading(model: Any, texts: list[str], length: int, _: Any) -> Ways:
    """The student: embeddings, with what all prompts share read once and with each, soft prompts, hidden states."""
    encoder = _encoder(model, length)
    yield "encode, instruction", lambda: encoder.encode(texts, instruction=INSTRUCTION)
    yield "encode", lambda: encoder.encode(texts)
    yield "soft prompts", lambda: encoder.soft_prompts(texts)
    yield "hidden states", lambda: encoder.hidden_states(texts)


def _teachers(model: Any, texts: list[str], length: int, mode: Any) -> Ways:
    """Pooled readings of the backbone, causal, echo and in both directions, and a sentence encoder."""
    from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
    from pipeline.embed.teachers.pooling import PooledTeacher
    from pipeline.embed.teachers.template import TEMPLATES, TemplateTokenizer

    body = model.get_decoder()

    def teacher(template: str, max_tokens: int) -> Any:
        tokenizer = TemplateTokenizer(models.word_tokenizer(), max_tokens=max_tokens, template=TEMPLATES[template])
        return PooledTeacher(body, tokenizer, identity={})

    yield "backbone", lambda: teacher("text", length).embed(texts)
    yield "echo", lambda: teacher("echo", 2 * length + 8).embed(texts)
    make_bidirectional(body)
    check_bidirectional(body, "fake")
    yield "both directions", lambda: teacher("text", length).embed(texts)
    if TEACHER.is_dir():
        encoder = _sentence_encoder(mode)
        yield "sentence encoder", lambda: encoder.embed(texts)


def _sentence_encoder(mode: Any) -> Any:
    """all-MiniLM-L6-v2, its weights read on the host and then fake."""
    from sentence_transformers import SentenceTransformer

    from pipeline.embed.teachers import sentence_transformers as teachers

    with models.real():
        model = SentenceTransformer(str(TEACHER), device="cpu", model_kwargs={"dtype": "bfloat16"})
    models.make_fake(model, mode)
    with mock.patch.object(teachers, "load_model", lambda *_: model):
        return teachers.SentenceTransformersTeacher(str(TEACHER), revision=None, max_tokens=256, dtype="bfloat16")


def _heads(model: Any, texts: list[str], length: int, _: Any) -> Ways:
    """The lens, decoding of soft prompts, and answers of the engine `transformers`, greedy and sampled."""
    from pipeline.generate.engines.base import Prompt, Sampling
    from pipeline.generate.engines.transformers import TransformersEngine
    from pipeline.lens.decoding import decode_soft_prompts
    from pipeline.lens.reading import outputs_for_texts
    from pipeline.lens.vocabulary import words_of

    encoder = _encoder(model, length)
    hidden, soft_prompts = encoder.hidden_states(texts), encoder.soft_prompts(texts)
    engine = TransformersEngine(model, encoder.tokenizer, max_model_len=length + ANSWER_TOKENS, batch_size=len(texts))
    prompts = [Prompt(str(row), [2 + row] * (length // (1 + row % 2)), seed=row) for row in range(len(texts))]

    def answers(temperature: float) -> None:
        failed = [done.error for done in engine.generate(prompts, Sampling(ANSWER_TOKENS, temperature)) if done.error]
        if failed:
            raise RuntimeError(failed[0])

    yield "lens", lambda: (outputs_for_texts(encoder, texts), words_of(encoder, hidden, 8))
    yield "decode", lambda: decode_soft_prompts(encoder, soft_prompts, max_new_tokens=ANSWER_TOKENS)
    yield "generate, greedy", lambda: answers(0.0)
    yield "generate, sampled", lambda: answers(1.0)
