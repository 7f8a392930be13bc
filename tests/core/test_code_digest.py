"""What a module imports, and a digest of it that an edit changes and a docstring does not."""

from pathlib import Path

import pytest

from pipeline.core.code_digest import code_digest, import_closure
from tests.conftest import ROOT

FILES = {
    "__init__.py": '"""A package."""\n',
    "go/__init__.py": "",
    "go/__main__.py": "from pipeline.a import f\n\ndef run():\n    from pipeline.deep import late\n",
    "a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline import typed\n",
    "deep/__init__.py": 'WHERE = {"x": "pipeline.named:Class"}\nSENTENCE = "pipeline.unused is not a module here"\n',
    "deep/late.py": "from pipeline import b\n",
    "b.py": "import pipeline.a\n\ndef f():\n    \"\"\"Says what.\"\"\"\n    return 1  # why\n",
    "named.py": "X = 1\n",
    "typed.py": "X = 1\n",
    "unused.py": "X = 1\n",
}  # fmt: skip


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "pipeline" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_closure_follows_late_imports_packages_and_names_in_strings(package: Path) -> None:
    found = {path.relative_to("pipeline").as_posix() for path in import_closure(["pipeline.go.__main__"], package)}
    assert found == FILES.keys() - {"typed.py", "unused.py"}


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("b.py", "return 1", "return 2", False),
        ("named.py", "X = 1", "X = 2", False),
        ("b.py", "Says what.", "Says something else.", True),
        ("b.py", "# why", "# because", True),
        ("__init__.py", '"""A package."""', "", True),
        ("unused.py", "X = 1", "X = 2", True),
        ("typed.py", "X = 1", "X = 2", True),
    ],
)
def test_the_digest_follows_code_and_ignores_docstrings(
    package: Path, file: str, old: str, new: str, same: bool
) -> None:
    before = code_digest(["pipeline.go.__main__"], package)
    path = package / "pipeline" / file
    path.write_text(path.read_text().replace(old, new))
    assert (code_digest(["pipeline.go.__main__"], package) == before) == same


def test_a_training_step_depends_on_the_passes_and_answers_and_not_on_inference() -> None:
    from pipeline.train.__main__ import STEP_CODE

    found = {path.relative_to("pipeline").as_posix() for path in import_closure(STEP_CODE, ROOT)}
    assert found >= {"backbone/loading.py", "generate/response_text.py", "train/losses.py", "encoder/passes/packed.py"}
    assert not found & {"encoder/inference.py", "encoder/folder/write.py", "train/__main__.py", "cli/plan.py"}


def test_a_teaching_step_depends_on_what_decides_it_and_on_no_teacher() -> None:
    found = {path.relative_to("pipeline").as_posix() for path in import_closure(["pipeline.teach.recipe"], ROOT)}
    assert found >= {"teach/mntp.py", "teach/simcse.py", "teach/dropout.py", "backbone/output_head.py"}
    assert not {path for path in found if path.startswith("evaluate/")} | found & {"teach/quality.py", "teach/card.py"}
    decisive = {"__init__", "adapters", "bidirectional", "pooling", "template"}
    assert {path for path in found if path.startswith("embed/")} == {
        "embed/__init__.py",
        *(f"embed/teachers/{name}.py" for name in decisive),
    }
