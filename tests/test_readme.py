"""The README's list of files is complete, and names nothing that is gone."""

import re

from tests.conftest import ROOT


def test_one_line_per_file() -> None:
    listed = re.findall(r"^  (\S+\.py) ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    files = [path.relative_to(ROOT / "pipeline").as_posix() for path in (ROOT / "pipeline").rglob("*.py")]
    assert sorted(listed) == sorted(name for name in files if not name.endswith("__init__.py"))
