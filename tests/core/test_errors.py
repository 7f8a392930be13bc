"""An error names a component's argument; its callers say which params key that is."""

import pytest

from pipeline.core.errors import PipelineError, TrainingError, describe, first_line, nested_in, section


def fail(argument: str | None) -> None:
    raise TrainingError("0 is below 1", argument=argument)


def test_an_argument_gets_its_key_from_the_callers() -> None:
    with pytest.raises(TrainingError) as caught, section("train"), nested_in("lora"):
        fail("r")
    assert str(caught.value) == "train.lora.r: 0 is below 1"


def test_the_innermost_section_holds() -> None:
    with pytest.raises(TrainingError) as caught, section("train"), nested_in("x"), section("backbone"):
        fail("name")
    assert str(caught.value) == "backbone.name: 0 is below 1"


def test_names_map_single_arguments() -> None:
    with pytest.raises(PipelineError) as caught, section("generate"), nested_in(names={"processes": "data_parallel"}):
        fail("processes")
    assert str(caught.value) == "generate.data_parallel: 0 is below 1"


def test_without_a_caller_the_argument_stands_alone() -> None:
    with pytest.raises(PipelineError, match=r"^r: 0 is below 1$"):
        fail("r")


def test_an_error_about_no_argument_keeps_its_message() -> None:
    with pytest.raises(PipelineError) as caught, section("train"), nested_in("lora"):
        fail(None)
    assert str(caught.value) == "0 is below 1"


def test_a_message_of_several_lines_or_of_none_is_one_line() -> None:
    assert (first_line(ValueError(" one\ntwo")), describe(ValueError("one\ntwo"))) == ("one", "ValueError: one")
    assert (first_line(TimeoutError()), describe(TimeoutError(" \n"))) == ("TimeoutError", "TimeoutError")
