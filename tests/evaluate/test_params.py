from typing import Any

import pytest

from pipeline.core.config import validate
from pipeline.core.errors import ParamsError
from pipeline.evaluate.params import EvaluateParams


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"systems": ["pupil"]}, r"systems: .*no system pupil \(there are: student, start, .*hyde; others are keys"),
        (
            {"systems": ["mini", "tiny"], "models": {"mini": {"name": "m"}}},
            r"no system tiny \(there are: .*hyde, mini;",
        ),
        ({"systems": ["student", "student"]}, r"systems \['student', 'student'\] contains a duplicate"),
        ({"models": {"echo": {"name": "m"}}}, r"models: .*'echo' is a built-in system"),
        ({"models": {"untrained-1": {"name": "m"}}}, r"'untrained-1' is a built-in system"),
        ({"models": {"delta": {"name": "m"}}}, r"'delta' cannot name a system"),
        ({"models": {"a/b": {"name": "m"}}}, r"'a/b' cannot name a system"),
        ({"models": {"mini": {}}}, r"models\.mini\.name: missing"),
        ({"seeds": []}, r"seeds: List should have at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\] contains a duplicate"),
        ({"seeds": [-1]}, r"seeds \[-1\] must be 0 or more"),
        ({"seeds": [2**64]}, "must be 0 or more, and below 18446744073709551616"),
        ({"seed": 0}, r"seed: unknown key \(did you mean 'seeds'\?\)"),
        ({"stored": [{}]}, r"stored\.0: .*needs truncate_dim or quantize"),
        ({"stored": [{"quantize": "int4"}]}, r"stored\.0\.quantize: Input should be 'int8' or 'binary'"),
        ({"stored": [{"truncate_dim": 8}] * 2}, r"stored contains a duplicate"),
        ({"stored": [{"truncate_dim": 8}], "cache_embeddings": False}, r"stored needs cache_embeddings: true"),
        ({"stored": [{"truncate_dim": 8}], "systems": ["echo"]}, r"stored needs the student among the systems"),
        (
            {"stored": [{"truncate_dim": 8, "quantize": "int8"}], "models": {"student-8-int8": {"name": "m"}}},
            "models: 'student-8-int8' is the name of a form in stored",
        ),
        ({"model_name": "mine"}, r"model_name: String should match pattern"),
    ],
)
def test_the_section_is_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        validate({"systems": ["student"], "local_dir": "x", **section}, EvaluateParams, where="params.yaml")


def test_models_may_be_compared_whatever_the_order_of_the_keys() -> None:
    section = {"systems": ["student", "mini"], "local_dir": "x", "models": {"mini": {"name": "m", "query_prompt": ""}}}
    params = validate(section, EvaluateParams, where="params.yaml")
    assert params.models["mini"].query_prompt == "" and params.models["mini"].document_prompt is None
    assert params.seeds == [0] and params.bootstrap.resamples == 2000
