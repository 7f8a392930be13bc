"""Limits on shares: named with value and limit, warned of or raised."""

import logging

import pytest
from pydantic import Field

from pipeline.core.config import Params
from pipeline.core.errors import EngineError, section
from pipeline.core.gates import check_gates, warn_of_gates


class Gates(Params):
    first: float = Field(default=0.1)
    second: float = Field(default=0.5)


CAUSES = {"first": "of the rows are bad: mend them", "second": "of the rows are odd: look"}


def test_within_the_limits_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    measured = {"first": 0.1, "second": 0.0}
    check_gates(Gates(), measured, CAUSES, EngineError)
    warn_of_gates("stage", Gates(), measured, CAUSES)
    assert not caplog.records


def test_every_measure_above_its_limit_is_named() -> None:
    with pytest.raises(EngineError) as caught, section("generate"):
        check_gates(Gates(), {"first": 0.25, "second": 1.0}, CAUSES, EngineError)
    first, second, _ = str(caught.value).splitlines()
    assert first == "generate.gates.first: 0.25 of the rows are bad: mend them; the limit is 0.1"
    assert second == "gates.second: 1 of the rows are odd: look; the limit is 0.5"


def test_a_warning_names_the_gate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    warn_of_gates("generate", Gates(), {"first": 0.25, "second": 0.1}, CAUSES)
    [line] = caplog.messages
    assert "0.25 of the rows are bad" in line
    assert "gates.first" in line
