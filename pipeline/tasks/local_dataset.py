"""A data set in a local folder, laid out as on a hub (README.md with `configs:`, and files), or as BEIR is downloaded.

    ---
    configs:
    - config_name: corpus
      data_files:
      - {split: corpus, path: corpus.jsonl}
    ---

BEIR's folders have no README.md, but corpus.jsonl, queries.jsonl and judgements of each split, qrels/test.tsv. Files
are read by `core/readers`: no hub, no cache of another library, and equal files mean an equal revision.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.errors import EvaluationError, SourceError
from pipeline.core.files import digest_of, file_sha256
from pipeline.core.readers import read_table

README = "README.md"
# The lines between two lines of three hyphens; hyphens within a line are text.
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


class LocalData:
    """The configs, splits and tables of one folder."""

    def __init__(self, folder: Path) -> None:
        """Read the folder's README; raises EvaluationError, naming what is missing or malformed."""
        self.folder = folder
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: no such folder of a local data set{_neighbours(folder)}")
        self.files = _beir_files(folder) or {
            str(config["config_name"]): self._splits(config) for config in _configs(folder / README)
        }

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def revision(self) -> str:
        """20 hex digits that change with any byte of its files."""
        paths = {path for splits in self.files.values() for files in splits.values() for path in files}
        readme = {self.folder / README} if (self.folder / README).exists() else set[Path]()
        names = sorted(path.relative_to(self.folder).as_posix() for path in paths | readme)
        return digest_of({name: file_sha256(self.folder / name) for name in names})[:20]

    def split_of(self, config: str, wanted: str) -> str:
        """`wanted`, or else the config's only split; raises EvaluationError if it has several others."""
        splits = self.files[config]
        if wanted in splits:
            return wanted
        if len(splits) > 1:
            raise EvaluationError(
                f"{self.folder}: config '{config}' has no split '{wanted}' (it has {', '.join(sorted(splits))})"
            )
        return next(iter(splits))

    def read(
        self,
        config: str,
        split: str,
        *,
        required: Sequence[str] = (),
        texts: Sequence[str] = (),
        numbers: Sequence[str] = (),
        optional: Sequence[str] = (),
    ) -> pa.Table:
        """One split as a table.

        Args:
            required: columns that must be there, of any type.
            texts: columns that must be there, as strings; a chat is its first user turn.
            numbers: columns that must be there, as float64; CSV has only texts.
            optional: as `texts`, but they may be missing or null.

        Raises:
            EvaluationError: a file is unreadable or empty, or a column is missing, has nulls or other values.
        """
        with evaluation_files():
            table = read_table(*self.files[config][split], texts=(*texts, *optional))
        wanted = list(dict.fromkeys((*required, *texts, *numbers)))
        missing = [column for column in wanted if column not in table.column_names]
        where = f"{self.folder}: config '{config}', split '{split}'"
        if missing:
            raise EvaluationError(
                f"{where}: column{'s' if len(missing) > 1 else ''} {_quoted(missing)} missing "
                f"(it has {_quoted(table.column_names)})"
            )
        if not table.num_rows:
            raise EvaluationError(f"{where}: no rows")
        for column in wanted:
            if table[column].null_count:
                raise EvaluationError(f"{where}: column '{column}' has {table[column].null_count} empty rows")
        for column in numbers:
            found = _numbers(table[column].to_pylist(), f"{where}: column '{column}'")
            table = table.set_column(table.column_names.index(column), column, pa.array(found, pa.float64()))
        return table

    def columns(self, config: str) -> list[str]:
        """The columns of a config's first split."""
        return self.read(config, next(iter(self.files[config]))).column_names

    def _splits(self, config: dict[str, Any]) -> dict[str, list[Path]]:
        splits: dict[str, list[Path]] = {}
        for entry in _data_files(config["data_files"], self.folder):
            for pattern in _as_list(entry["path"]):
                paths = sorted(self.folder.glob(pattern))
                if not paths:
                    raise EvaluationError(f"{self.folder / pattern}: no such file, though {README} lists it")
                splits.setdefault(str(entry["split"]), []).extend(paths)
        return splits


def _numbers(values: Iterable[Any], where: str) -> list[float]:
    found = []
    for row, value in enumerate(values):
        try:
            found.append(float(value))
        except (ValueError, TypeError):
            raise EvaluationError(f"{where}, row {row}: {value!r:.40} is no number") from None
    return found


def _beir_files(folder: Path) -> dict[str, dict[str, list[Path]]] | None:
    """The configs of a folder as BEIR is downloaded, None of another one."""
    judgements = {path.name.split(".")[0]: [path] for path in sorted((folder / "qrels").glob("*.tsv*"))}
    tables = {name: sorted(folder.glob(f"{name}.jsonl*")) for name in ("corpus", "queries")}
    if not judgements or not all(tables.values()):
        return None
    return {**{name: {name: paths} for name, paths in tables.items()}, "default": judgements}


def _configs(readme: Path) -> list[dict[str, Any]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = _FRONT_MATTER.match(readme.read_text(encoding="utf-8-sig"))
        configs = YAML(typ="safe", pure=True).load(found[1])["configs"] if found else []
        if configs and all({"config_name", "data_files"} <= set(config) for config in configs):
            return list(configs)
    except FileNotFoundError:
        raise EvaluationError(f"{readme} does not exist: it must list the folder's `configs:`") from None
    except (KeyError, TypeError, UnicodeDecodeError, YAMLError):
        pass
    raise EvaluationError(
        f"{readme}: must start with '---' and a YAML list `configs:` whose entries have `config_name` and `data_files`"
    )


def _data_files(value: Any, folder: Path) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"split": "train", "path": value}]
    if isinstance(value, list) and all(isinstance(entry, dict) and {"split", "path"} <= set(entry) for entry in value):
        return value
    raise EvaluationError(f"{folder / README}: `data_files` must be a path, or a list of `split` and `path`: {value}")


def _as_list(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


@contextlib.contextmanager
def evaluation_files() -> Iterator[None]:
    """Errors about files that are read inside are errors of the evaluation."""
    try:
        yield
    except SourceError as error:
        raise EvaluationError(error.message) from None


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _neighbours(folder: Path) -> str:
    if not folder.parent.is_dir():
        return f" ({folder.parent} does not exist)"
    found = sorted({path.parent.name for name in (README, "corpus.jsonl*") for path in folder.parent.glob(f"*/{name}")})
    return f" (there are: {', '.join(found)})" if found else f" ({folder.parent} holds none)"
