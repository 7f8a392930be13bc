import pytest

from pipeline.evaluate.registry import in_teacher_space, split_seed


@pytest.mark.parametrize(
    ("name", "base", "seed", "in_space"),
    [
        ("student", "student", None, True),
        ("untrained", "untrained", None, True),
        ("untrained-12", "untrained", 12, True),
        ("echo", "echo", None, False),
        ("echo-2", "echo-2", None, False),
        ("untrained-x", "untrained-x", None, False),
        ("mini", "mini", None, False),
    ],
)
def test_a_name_says_entry_seed_and_space(name: str, base: str, seed: int | None, in_space: bool) -> None:
    assert split_seed(name) == (base, seed)
    assert in_teacher_space(name) is in_space
