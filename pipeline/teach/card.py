"""The README of a trained teacher."""

import json
from collections.abc import Mapping
from typing import Any

_CARD = """\
---
{base_model}library_name: peft
pipeline_tag: sentence-similarity
tags: [llm2vec, lora, embeddings]
---

# An LLM2Vec teacher of {name}

Two LoRA adapters that turn a causal language model into a text embedder, trained from unlabeled text by the LLM2Vec
recipe (BehnamGhader et al. 2024): attention in both directions, masked next-token prediction (`mntp/`), unsupervised
SimCSE (`simcse/`). The model: {identity}. A text is read as `{template}`, and its embedding is the mean of the last
hidden states over {pooled}.

## Use

Standard peft folders, saved from the model without its head, to be merged in this order:

```python
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("{name}")
model = PeftModel.from_pretrained(model, "mntp").merge_and_unload()
model = PeftModel.from_pretrained(model, "simcse").merge_and_unload().eval()
model.config.is_causal = model.config.use_cache = False
for module in model.modules():
    if hasattr(module, "is_causal"):
        module.is_causal = False
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without the last lines attention stays causal and the embeddings are others. The tokenizer is the backbone's, unchanged:
the mask token {mask} is a token of its vocabulary. In the project that trained it: `embed.teacher.kind:
llm2vec-trained`, or kind `llm2vec` with these two folders as `adapters`.

## Training

{phases}
{params}
How good it is, beside mean pooling of the backbone, the stage that trained it wrote to `results/teach.json`.

## Limits

- It knows the language and the domains of the text it was trained on, and inherits what the backbone gets wrong.
- It never saw which texts belong together: do not expect what embedders trained on labelled pairs give.
- An embedding means nothing with another backbone, or beside another model's embeddings.
"""


def model_card(
    backbone: Mapping[str, str],
    *,
    phases: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Any],
    template: str,
    pooled: str,
    mask_token: str,
) -> str:
    """The card, the same for the same teacher.

    Args:
        backbone: its identity.
        phases: facts by phase.
        params: section `teach`, what decided the adapters.
        pooled: which tokens are pooled, in words.
    """
    local = "sha256" in backbone
    return _CARD.format(
        base_model="" if local else f"base_model: {json.dumps(backbone['name'])}\n",
        name=backbone["name"],
        identity=", ".join(f"{key} `{value}`" for key, value in backbone.items()),
        template=template,
        pooled=pooled,
        mask=f"`{mask_token}`",
        phases=_table("phase", phases),
        params="\n" + "\n".join(["| param | value |", "|---|---|", *_params(params, "teach.")]) + "\n",
    )


def _table(first: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(row.get(key, '')) for key in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def _params(values: Mapping[str, Any], above: str) -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _params(value, f"{above}{key}.")
        else:
            lines.append(f"| `{above}{key}` | `{_cell(value)}` |")
    return lines


def _cell(value: Any) -> str:
    """A bar ends a cell, also within code."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|")
