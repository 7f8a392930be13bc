import pytest

from pipeline.evaluate.registry import is_reading, split_seed, system_order
from pipeline.evaluate.system import in_teacher_space
from tests.evaluate.fakes import Named


@pytest.mark.parametrize(
    ("name", "base", "seed", "in_space"),
    [
        ("student", "student", None, True),
        ("untrained", "untrained", None, True),
        ("untrained-12", "untrained", 12, True),
        ("echo", "echo", None, False),
        ("echo-2", "echo-2", None, False),
        ("untrained-x", "untrained-x", None, False),
        ("untrained-standardized", "untrained-standardized", None, False),
        ("untrained-standardized-2", "untrained-standardized", 2, False),
        ("start", "start", None, True),
        ("mini", "mini", None, False),
    ],
)
def test_a_name_says_entry_seed_and_space(name: str, base: str, seed: int | None, in_space: bool) -> None:
    assert split_seed(name) == (base, seed)
    assert in_teacher_space(Named(name, {})) is in_space
    assert not in_teacher_space(Named(name, {"config": {"response_share": 0.3}}))


def test_readings_are_what_nothing_of_is_trained() -> None:
    names = ["hyde", "echo", "untrained-3", "mini", "start", "untrained-standardized-1", "student", "backbone-mean"]
    assert [name for name in sorted(names, key=system_order) if is_reading(name)] == [
        "untrained-3", "untrained-standardized-1", "backbone-mean", "echo",
    ]  # fmt: skip
