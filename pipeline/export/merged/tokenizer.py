"""A tokenizer whose post-processor adds the template around a text and the new tokens at its end.

The post-processor runs after truncation, so its tokens are never cut off. The new ids are not in the vocabulary: no
text can spell them, and rows of the embedding matrix without a token may lie before them.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.backbone.loading import Template
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.errors import TrainingError
from pipeline.core.files import write_json
from pipeline.encoder.folder.tokenizer import save_tokenizer
from pipeline.export.merged.folder import MergedLayout

# A frame is correct if it is the same around all of these.
PROBES = [
    "What is the capital of France?",
    "x",
    "12 apples, 3.5 kg",
    "(see below)",
    "'quoted' \"text\"",
    "Zürich, naïve, 東京, привет, 🙂",
    "def f(x):\n    return x\n\n\n# end",
    "- a list\n- of two",
    "<b>markup</b> & {braces}",
    "...",
    "\\frac{1}{2}",
]
# Longer than any frame and any probe.
UNBOUNDED = 2**20
# Settings that would change the post-processor on loading, or change truncation and padding.
_DROPPED = ("add_bos_token", "add_eos_token", "chat_template", "max_length", "truncation_side", "truncation_strategy",
            "stride", "pad_to_multiple_of", "auto_map")  # fmt: skip


class Frame(NamedTuple):
    """Token ids before and after the tokens of each text."""

    before: list[int]
    behind: list[int]

    def around(self, ids: Sequence[int]) -> list[int]:
        return [*self.before, *ids, *self.behind]


def find_frame(tokenizer: Any, template: Template, chat_template_kwargs: Mapping[str, Any]) -> Frame:
    """The token ids that the template puts around a text.

    Raises TrainingError if they depend on the text, so that no post-processor can add them.
    """
    if template == "echo":
        raise TrainingError(
            "template echo: a text stands twice in its prompt, which the checkpoint's tokenizer cannot write"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise TrainingError(f"tokenizer of '{tokenizer.name_or_path}' has no tokenizer.json: it cannot append tokens")
    formatter = PromptFormatter(tokenizer, template, UNBOUNDED, dict(chat_template_kwargs))
    whole = [prompt.token_ids for prompt in formatter.batch(PROBES)]
    bare = tokenizer(PROBES, add_special_tokens=False)["input_ids"]
    misfit = PROBES[0]
    for start in range(len(whole[0]) - len(bare[0]) + 1):
        frame = Frame(whole[0][:start], whole[0][start + len(bare[0]) :])
        wrong = [text for text, ids, own in zip(PROBES, whole, bare, strict=True) if ids != frame.around(own)]
        if not wrong:
            return frame
        if wrong[0] != PROBES[0]:
            misfit = wrong[0]
    raise TrainingError(
        f"template {template} of '{tokenizer.name_or_path}' is not the same tokens around every text (around "
        f"{misfit!r} it differs): a tokenizer cannot add it, an encoder trained with the template raw can be exported"
    )


def fitting_probes(tokenizer: Any, frame: Frame, max_tokens: int) -> list[str]:
    """The probes of at most `max_tokens` tokens, frame included."""
    bare = tokenizer(PROBES, add_special_tokens=False)["input_ids"]
    return [text for text, ids in zip(PROBES, bare, strict=True) if len(frame.around(ids)) <= max_tokens]


def write_tokenizer(folder: Path, tokenizer: Any, frame: Frame, layout: MergedLayout) -> None:
    """Write the files of a tokenizer that adds the frame and the new tokens."""
    save_tokenizer(tokenizer, folder)
    content = _read(folder / "tokenizer.json")
    content |= {"truncation": None, "padding": None, "post_processor": _post_processor(tokenizer, frame, layout)}
    write_json(folder / "tokenizer.json", content)
    # sentence-transformers would apply a chat template that lies in the folder.
    for leftover in [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*")]:
        leftover.unlink(missing_ok=True)
    settings = {name: value for name, value in _read(folder / "tokenizer_config.json").items() if name not in _DROPPED}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": layout.max_tokens,
        "truncation_side": "right" if layout.keep == "start" else "left",
        # So the new tokens have their trained positions in every batch.
        "padding_side": "right",
        "pad_token": tokenizer.pad_token or tokenizer.eos_token,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _post_processor(tokenizer: Any, frame: Frame, layout: MergedLayout) -> dict[str, Any]:
    pieces = {
        "frame": (frame.before, tokenizer.convert_ids_to_tokens(frame.before)),
        "new": (
            [*frame.behind, *layout.new_ids],
            [*tokenizer.convert_ids_to_tokens(frame.behind), *layout.new_names],
        ),
    }
    before = [{"SpecialToken": {"id": "frame", "type_id": 0}}] if frame.before else []
    behind = [{"SpecialToken": {"id": "new", "type_id": 0}}]
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *behind],
        "pair": [*before, first, second, *behind],
        "special_tokens": {
            name: {"id": name, "ids": ids, "tokens": tokens} for name, (ids, tokens) in pieces.items() if ids
        },
    }
