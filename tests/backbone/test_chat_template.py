"""Chat templates that drop the text, print the date, fail, or want other arguments: the right prompt or one line."""

from datetime import date
from typing import Any

import pytest

from pipeline.backbone.chat_template import ChatTemplate
from pipeline.backbone.loading import BackboneParams
from pipeline.backbone.prompting import PromptFormatter
from pipeline.core.config import validate
from pipeline.core.errors import BackboneError, ParamsError
from tests.conftest import tiny_tokenizer

PARTS = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}<|end|>"
TODAY = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
OWN_DATE = "{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}{{ date_string }} "


def formatted(template: str, text: str, **kwargs: Any) -> str:
    tokenizer = tiny_tokenizer(template)
    return str(tokenizer.decode(PromptFormatter(tokenizer, "chat", 80, kwargs)(text).token_ids))


def test_a_template_of_content_parts_gets_the_text_as_a_part() -> None:
    assert [formatted(PARTS, text) for text in ("one", "two")] == ["one<|end|>", "two<|end|>"]


def test_a_template_that_refuses_strings_gets_parts() -> None:
    refusing = "{% if messages[0]['content'] is string %}{{ raise_exception('parts, please') }}{% endif %}" + PARTS
    assert formatted(refusing, "one") == "one<|end|>"


def test_a_template_that_prints_parts_as_they_are_is_refused() -> None:
    printing = "{% if messages[0]['content'] is not string %}{{ messages[0]['content'] }}{% endif %}<|end|>"
    with pytest.raises(BackboneError, match="leaves the user's text out: .*'type': 'text'"):
        ChatTemplate(tiny_tokenizer(printing), {})


def test_a_template_that_leaves_the_text_out_is_refused_with_what_it_prints() -> None:
    with pytest.raises(BackboneError, match=r"leaves the user's text out: '<\|user\|>hello' for 'Copper 7315'"):
        ChatTemplate(tiny_tokenizer("<|user|>hello"), {})


def test_a_template_that_prints_the_date_is_noticed_and_can_be_fixed() -> None:
    with pytest.raises(BackboneError, match=f'date.*chat_template_kwargs.*strftime_now: "{date.today().isoformat()}"'):
        ChatTemplate(tiny_tokenizer(TODAY), {})
    assert formatted(TODAY, "q", strftime_now="2024-07-26") == "26 Jul 2024: q"


def test_the_templates_own_variable_fixes_the_date_too() -> None:
    template = OWN_DATE + "{{ messages[0]['content'] }}"
    with pytest.raises(BackboneError, match="date"):
        ChatTemplate(tiny_tokenizer(template), {})
    assert formatted(template, "q", date_string="26 Jul 2024") == "26 Jul 2024 q"


@pytest.mark.parametrize("value", ["26 Jul 2024", 20240726, True])
def test_a_day_that_is_none(value: Any) -> None:
    with pytest.raises(BackboneError, match="strftime_now in chat_template_kwargs is .*2024|True"):
        ChatTemplate(tiny_tokenizer(TODAY), {"strftime_now": value})


@pytest.mark.parametrize(
    ("template", "kwargs", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", {}, "TemplateError: roles must alternate"),
        ("{{ raise_exception('') }}", {}, "fails: TemplateError$"),
        (
            "{{ 'day ' + day }}{{ messages[0]['content'] }}",
            {"day": 5},
            r"with .*\{'day': 5\}: TypeError: can only concat",
        ),
        ("{% for %}", {}, "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(BackboneError, match=why) as caught:
        ChatTemplate(tiny_tokenizer(template), kwargs)
    assert "\n" not in str(caught.value)


ROLES = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def test_a_system_turn_stands_before_the_users() -> None:
    assert ChatTemplate(tiny_tokenizer(ROLES), {}, "Be brief.").render("one") == "system: Be brief.\nuser: one\n"
    assert ChatTemplate(tiny_tokenizer(ROLES), {}, "").render("one") == "system: \nuser: one\n"
    assert ChatTemplate(tiny_tokenizer(ROLES), {}).render("one") == "user: one\n"


def test_a_template_of_parts_gets_the_system_turn_as_a_part() -> None:
    parts = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}|{% endfor %}{% endfor %}"
    assert ChatTemplate(tiny_tokenizer(parts), {}, "Be brief.").render("one") == "Be brief.|one|"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[-1]['content'] }}", "leaves a turn out: 'Copper 7315' for 'Be brief.'"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + ROLES,
            "TemplateError: no system role; without a system turn it does not",
        ),
    ],
)
def test_a_template_without_a_system_turn_refuses_one(template: str, why: str) -> None:
    ChatTemplate(tiny_tokenizer(template), {})
    with pytest.raises(BackboneError, match=why) as caught:
        ChatTemplate(tiny_tokenizer(template), {}, "Be brief.")
    assert caught.value.argument == "system"


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "conversation", "messages", "return_dict"])
def test_arguments_of_the_pipeline_are_no_variables(name: str) -> None:
    with pytest.raises(BackboneError, match=f"chat_template_kwargs may not set {name}"):
        ChatTemplate(tiny_tokenizer(), {name: True})


def test_a_template_variable_that_is_no_json_is_named_with_its_type() -> None:
    content = {"name": "m", "chat_template_kwargs": {"date_string": date(2024, 7, 26)}}
    with pytest.raises(ParamsError, match=r"chat_template_kwargs: .*date_string is 2024-07-26 \(date\).*quotes"):
        validate(content, BackboneParams)


def test_a_tokenizer_that_reads_all_texts_alike_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(BackboneError, match="reads 'Copper 7315' and 'Velvet 2846' as the same tokens"):
        PromptFormatter(tokenizer, "raw", 80)
