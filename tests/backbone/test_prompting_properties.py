"""Whatever the text: a prompt keeps its limit, its template and one side of the text, alone as in a batch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backbone.loading import Keep, Template
from pipeline.backbone.prompting import PromptFormatter
from tests.conftest import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
# Not the template's own tokens, which a text may not spell.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40)


@pytest.mark.parametrize("template", ["raw", "chat"])
@pytest.mark.parametrize("keep", ["start", "end"])
@settings(max_examples=60)
@given(st.lists(texts, min_size=1, max_size=4), st.integers(5, 48))
def test_prompts_keep_their_limit_and_one_side_of_the_text(
    template: Template, keep: Keep, several: list[str], limit: int
) -> None:
    formatter = PromptFormatter(TOKENIZER, template, limit, keep=keep)
    whole = PromptFormatter(TOKENIZER, template, 100_000)
    prompts = formatter.batch(several)
    for text, prompt in zip(several, prompts, strict=True):
        full = whole(text).token_ids
        assert len(prompt.token_ids) <= limit
        assert prompt.truncated == (len(full) > limit)
        assert prompt.token_ids == (full if not prompt.truncated else whole(prompt.text).token_ids)
        assert text.startswith(prompt.text) if keep == "start" else text.endswith(prompt.text)
        if not prompt.truncated:
            assert prompt.text == text
        assert formatter(text) == prompt
