"""The tokenizer of a checkpoint of the authors: the backbone's with the new tokens added, both ways.

It is compared with ours on whole inputs, because start tokens, end tokens and templates change how a text is read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.backbone.prompting import PromptFormatter, eos_token_id
from pipeline.core.errors import ArtifactError, TrainingError
from pipeline.core.files import write_json
from pipeline.export.merged.tokenizer import PROBES, UNBOUNDED, Frame, find_frame
from pipeline.export.official import files

_NAMED = ("bos_token", "eos_token", "unk_token")


def check_tokenizer(folder: Path, appended: str, ids: Sequence[int], tokenizer: Any) -> None:
    """Raises ArtifactError unless `folder` reads a text followed by `appended` as `tokenizer` reads it, then `ids`."""
    from tokenizers import Tokenizer

    theirs = _plain(Tokenizer.from_file(str(folder / files.TOKENIZER)))
    ours = PromptFormatter(tokenizer, "raw", UNBOUNDED).batch(PROBES)
    for text, prompt in zip(PROBES, ours, strict=True):
        found, expected = theirs.encode(text + appended).ids, [*prompt.token_ids, *ids]
        if found != expected:
            read = f"{folder / files.TOKENIZER} reads {text!r} as {found}, the backbone's tokenizer as {expected}"
            raise ArtifactError(f"{read}: it is another backbone's, or it adds more than the new tokens")


def write_tokenizer(
    folder: Path, tokenizer: Any, texts: Sequence[str], formatter: PromptFormatter, frame: Frame | None
) -> list[int]:
    """Write the backbone's tokenizer with new tokens for version 4 of transformers; returns their ids.

    With a frame, the written tokenizer puts it and the new tokens around each text; without one, their package appends
    `texts`. Raises TrainingError if it cannot add them, or reads texts otherwise than `formatter`.
    """
    from tokenizers import AddedToken, Tokenizer

    backend = _plain(Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    ids = list(range(first := backend.get_vocab_size(), first + len(texts)))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    if (found := [backend.token_to_id(text) for text in texts]) != ids:
        raise TrainingError(f"the new tokens {', '.join(texts)} have ids {found} in the tokenizer, not {ids}")
    if frame is not None:
        backend.post_processor = _post_processor(backend, frame, ids)
    _check_written(backend, "".join(texts) if frame is None else "", ids, formatter)
    backend.save(str(folder / files.TOKENIZER))
    names = {name: token for name in _NAMED if (token := getattr(tokenizer, name, None)) is not None}
    eos = tokenizer.convert_ids_to_tokens(eos_token_id(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": list(texts) if frame is None else [],
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "truncation_side": "right",
        "pad_token": tokenizer.pad_token or eos,
        **names,
    }
    write_json(folder / files.TOKENIZER_CONFIG, settings)
    return ids


def own_frame(tokenizer: Any, template: Any, chat_template_kwargs: dict[str, Any]) -> Frame | None:
    """The frame that a checkpoint's tokenizer must add itself; None if their package reads texts in the same way.

    Raises TrainingError if the template depends on the text.
    """
    frame = find_frame(tokenizer, template, chat_template_kwargs)
    # The tokenizer adds a start token by itself.
    return frame if template == "chat" or frame.behind else None


def _plain(backend: Any) -> Any:
    """Without the truncation and padding that it was saved with."""
    backend.no_truncation()
    backend.no_padding()
    return backend


def _post_processor(backend: Any, frame: Frame, ids: Sequence[int]) -> Any:
    from tokenizers.processors import TemplateProcessing

    pieces = {"frame": frame.before, "new": [*frame.behind, *ids]}
    special = [
        {"id": name, "ids": list(piece), "tokens": [backend.id_to_token(token) for token in piece]}
        for name, piece in pieces.items()
        if piece
    ]
    return TemplateProcessing(single="frame $A new" if frame.before else "$A new", special_tokens=special)


def _check_written(backend: Any, appended: str, ids: Sequence[int], formatter: PromptFormatter) -> None:
    texts = [text.strip() for text in PROBES]
    for text, prompt in zip(texts, formatter.batch(texts), strict=True):
        if (found := backend.encode(text + appended).ids) != (expected := [*prompt.token_ids, *ids]):
            raise TrainingError(f"their package would read {text!r} as {found}, the encoder as {expected}")
