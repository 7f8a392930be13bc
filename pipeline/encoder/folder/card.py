"""The model card of an encoder folder: README.md as hubs show it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.encoder.folder.config import EncoderConfig

CARD_FILE = "README.md"
# What `with_results` puts the tables in place of.
NO_RESULTS = "This folder was written before it was evaluated."

_CARD = """\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, sentence-similarity, feature-extraction, llm2vec-gen]
{base_model}---
# Encoder of {backbone}

An embedding of this model encodes what `{backbone}` would answer to the input (LLM2Vec-Gen, arXiv 2603.10913), in one
forward pass and without generating anything. The backbone is frozen and not in this folder; `student.safetensors` holds
the {parameters:,} trained parameters: {tokens} new tokens and two linear layers. {adapted}{embeddings}

## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{place}", trust_remote_code=True)
queries = model.encode_query(["Why is the sky blue?"])
documents = model.encode_document(["Air scatters blue light more than red light."])
print(model.similarity(queries, documents))
```

`st_module.py` is all the code there is; it needs torch, transformers, safetensors and sentence-transformers{peft}.
{where}Other options go into the same `model_kwargs`: `"dtype": "bfloat16"` (float32 unless said), `"device_map"`,
`"attn_implementation"`, `"allow_other_backbone": True` where a backbone that is not the recorded one is wanted all the
same. Prompts are called `query`, `document`, and after the task types and tasks of mteb, which finds them by itself; a
prompt says what the language model should write. {limit}

What an embedding holds can be read, in the words of the same language model:

```python
soft_prompts = model.encode("Why is the sky blue?", output_value="token_embeddings")
print(model[0].decode(soft_prompts[None], max_new_tokens=64))
```

With the project that trained it: `python -m pipeline encode --model DIR --input FILE --output OUT.npy`.

## Training

| | |
|---|---|
| backbone | {backbone_identity} |
| teacher of the targets | {teacher} |
{space}| training rows | {rows:,} queries, answered by the backbone itself |
{sources}| input template | {template}, at most {max_query_tokens} tokens |
| new tokens | {compression_tokens} compression tokens, {thought_tokens} thought tokens before them |
| optimiser steps | {steps:,} |
{params}
## Results

{results}

## Limits

- It can be no safer and know no more than the backbone's own answers, and it inherits what they get wrong.
- Queries in other languages or domains than the training queries were not seen.
- An embedding means nothing with another backbone, with other weights of it, or beside another model's embeddings.
- A document is embedded as an answer to its prompt, a summary; without a prompt, as an answer to the document.
"""

_EMBEDDINGS = """\
Embeddings have {width}
dimensions, are not normalised, and are compared by cosine. {share}{order}"""

_SHARE = """\
The predicted response has a share of {share} in
them; the rest is the {reading} reading of the text itself, which {joined}. """

_UNORDERED = """\
They were not trained to be truncated to fewer
dimensions."""

_ORDERED = """\
They are rotated: the first dimensions hold
most of them, and `truncate_dim` of sentence-transformers keeps these. int8 must be led back by its ranges before it is
compared, and binary loses much: it weighs all dimensions alike."""

_ADAPTED = """\
`adapter/` holds LoRA adapters of rank {rank} with {parameters:,} parameters, under which the backbone embeds; answers
that embeddings decode to come from the backbone without them. """

_SPACE = """\
| space of the embeddings | the teacher's after the transform `{kind}` of `transform.safetensors`, which also leads \
back: `python -m pipeline encode --space teacher` |
"""

_LOCAL = """\
The backbone is looked for in the folder `{name}`; elsewhere, say where: `model_kwargs={{"backbone": PATH}}`, or the
environment variable `LLM2VEC_GEN_BACKBONE=PATH`. Its sha256 is compared with the recorded one.
"""

_HUB = """\
The backbone is loaded from the hub at the recorded revision; a copy on disk is given by
`model_kwargs={{"backbone": PATH}}`, or by the environment variable `LLM2VEC_GEN_BACKBONE=PATH`.
"""


@dataclass(frozen=True)
class TrainingFacts:
    """What a card says of the training: rows, optimiser steps, queries by source, resolved params by section."""

    rows: int
    steps: int
    sources: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    config: "EncoderConfig", facts: TrainingFacts, *, parameters: int, adapter_parameters: int = 0, place: str = "DIR"
) -> str:
    """The card of an encoder that has not been evaluated; `place` is what to load it by."""
    backbone, lora = config.backbone, config.lora
    local = "sha256" in backbone
    return _CARD.format(
        base_model="" if local else f"base_model: {json.dumps(backbone['name'])}\n",
        backbone=backbone["name"],
        backbone_identity=_pairs(backbone),
        parameters=parameters,
        tokens=config.compression_tokens + config.thought_tokens,
        compression_tokens=config.compression_tokens,
        thought_tokens=config.thought_tokens,
        embeddings=_embeddings(config),
        adapted=_ADAPTED.format(rank=lora.rank, parameters=adapter_parameters) if lora else "",
        peft="; its adapters need peft" if lora else "",
        place=place,
        where=(_LOCAL if local else _HUB).format(name=backbone["name"]),
        limit=f"Texts of more than {config.max_query_tokens} tokens, prompt and template included, lose their "
        f"{'end' if config.keep == 'start' else 'start'}.",
        teacher=_pairs(config.teacher),
        space=_SPACE.format(**config.transform) if config.transform else "",
        rows=facts.rows,
        sources="".join(f"| training queries from {name} | {rows:,} |\n" for name, rows in facts.sources.items()),
        template=config.template,
        max_query_tokens=config.max_query_tokens,
        steps=facts.steps,
        params=_params_table(facts.params),
        results=NO_RESULTS,
    )


def with_results(card: str, tables: Sequence[str]) -> str:
    """A card with results, in place of the sentence that there are none."""
    return card.replace(NO_RESULTS, "\n\n".join(tables)) if tables else card


def with_config(card: str, before: "EncoderConfig", after: "EncoderConfig") -> str:
    """The card of an encoder whose response share or rotation became another one."""
    for text in (_embeddings, _share_row, _form_row):
        card = card.replace(text(before), text(after))
    if after.response_form == "beside" and not after.decorrelate_reading:
        of_added = "train.decorrelate_reading"
        card = card.replace(_row(of_added, True), _row(of_added, False))
    return card


def _embeddings(config: "EncoderConfig") -> str:
    share, joined = config.response_share, {"beside": "stands beside it", "added": "is added to it"}
    reading = "decorrelated" if config.decorrelate_reading else "standardised"
    return _EMBEDDINGS.format(
        width=config.embedding_width,
        share="" if share == 1 else _SHARE.format(share=share, reading=reading, joined=joined[config.response_form]),
        order=_ORDERED if config.ordered else _UNORDERED,
    )


def _share_row(config: "EncoderConfig") -> str:
    return _row("train.response_share", config.response_share)


def _form_row(config: "EncoderConfig") -> str:
    return _row("train.response_form", config.response_form)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} `{value}`" for key, value in values.items())


def _params_table(params: Mapping[str, Any]) -> str:
    rows = [_row(name, value) for name, value in _flat(params, "")]
    return "\n".join(["", "| param | value |", "|---|---|", *rows, ""]) if rows else ""


def _row(name: str, value: Any) -> str:
    # A bar ends a cell, also within code.
    shown = json.dumps(value, ensure_ascii=False).replace("|", "\\|")
    return f"| `{name}` | `{shown}` |"


def _flat(values: Mapping[str, Any], above: str) -> list[tuple[str, Any]]:
    flat = []
    for key, value in values.items():
        name = f"{above}{key}"
        flat += _flat(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return flat
