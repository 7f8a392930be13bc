"""The stub teacher, and how the params of a teacher are held."""

from typing import Any

import numpy as np
import pytest

from pipeline.backbone.loading import BackboneParams
from pipeline.core.config import validate
from pipeline.core.errors import ParamsError, TeacherError
from pipeline.embed.params import TeacherParams
from pipeline.embed.teachers.load import LOADERS, load_teacher
from pipeline.embed.teachers.registry import TEACHERS
from pipeline.embed.teachers.stub import HashTeacher

BACKBONE = BackboneParams(name="org/model")


def params(**keys: Any) -> TeacherParams:
    return validate(keys, TeacherParams, where="params.yaml")


def test_a_vector_depends_on_its_text_alone() -> None:
    teacher = HashTeacher(width=16)
    together = teacher.embed(["a", "b", "c"])
    assert together.shape == (3, 16)
    assert together.dtype == np.float32
    np.testing.assert_array_equal(teacher.embed(["c", "a"]), together[[2, 0]])
    assert not np.allclose(together[0], together[1])


def test_vectors_are_standard_normal() -> None:
    vectors = HashTeacher(width=64).embed([str(index) for index in range(500)])
    assert abs(vectors.mean()) < 0.03
    assert abs(vectors.std() - 1) < 0.03


def test_no_text_gives_no_row() -> None:
    assert HashTeacher(width=3).embed([]).shape == (0, 3)


def test_it_reads_all_of_every_text() -> None:
    assert HashTeacher(width=3).max_tokens is None
    assert HashTeacher(width=3).token_lengths(["", "two words"]) == [0, 2]


def test_every_kind_has_a_loader() -> None:
    assert LOADERS.keys() == TEACHERS.keys()


def test_built_by_kind_it_says_that_it_is_a_stub() -> None:
    teacher = load_teacher(params(kind="hash", options={"width": 5}), BACKBONE)
    assert teacher.width == 5
    assert teacher.identity["stub"] is True


def test_delay_is_no_part_of_the_identity() -> None:
    assert HashTeacher(delay=1.0).identity == HashTeacher().identity


@pytest.mark.parametrize(("options", "message"), [({"widht": 5}, "widht"), ({"width": 0}, "width is 0")])
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=rf"^embed\.teacher\.options: .*{message}"):
        load_teacher(params(kind="hash", options=options), BACKBONE)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "sentence-transformers"}, "needs name"),
        ({"kind": "backbone", "name": "org/other"}, "kind backbone takes no name"),
        ({"kind": "hash", "prompt": "query: "}, "kind hash takes no prompt"),
        ({"kind": "backbone", "options": {"width": 3}}, "kind backbone takes no options"),
        ({"kind": "hash", "template": "a {text}"}, "kind hash takes no template"),
        ({"kind": "sentence-transformers", "name": "a/b", "pooling": "last"}, "takes no pooling"),
        ({"kind": "backbone", "adapters": [{"name": "a/b"}]}, "kind backbone takes no adapters"),
        ({"kind": "backbone", "template": "no slot"}, r"template 'no slot' holds no \{text\}"),
        ({"kind": "llm2vec"}, "kind llm2vec needs adapters"),
        ({"kind": "llm2vec", "revision": "a", "adapters": [{"name": "a/b"}]}, "a revision needs a name"),
        ({"kind": "llm2vec", "adapters": [{"nmae": "a/b"}]}, r"adapters\.0\.nmae: unknown key"),
        ({"kind": "hush"}, "kind"),
        ({"kind": "hash", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_params_that_do_not_fit_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        params(**keys)
