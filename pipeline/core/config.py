"""Read params.yaml into strict pydantic models and report every mistake of it at once.

A stage asks for the sections it uses and nothing else, so that DVC's narrow params and the code agree.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.core.errors import ParamsError

PARAMS_FILE = Path("params.yaml")
# Of numbers that numpy and torch both take as a seed, which begin at 0.
SEEDS = 2**64

M = TypeVar("M", bound=BaseModel)


class Params(BaseModel):
    """A section of params.yaml: unknown keys are errors, types are exact, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def _shell_safe(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"{name!r} is no name of an entry: only letters, digits, '.', '_' and '-', not '.' or '-' first"
        )
    return name


# The key of an entry that is a DVC stage: it becomes a word of a command line and the name of a folder.
EntryName = Annotated[str, AfterValidator(_shell_safe)]


def check_unread_keys(params: Params, unread: Iterable[str]) -> None:
    """Raises ValueError if one of these keys, which the `kind` of the params does not read, is not its default."""
    for key in sorted(unread):
        default = type(params).model_fields[key].get_default(call_default_factory=True)
        if getattr(params, key) != default:
            raise ValueError(f"kind {getattr(params, 'kind', None)} takes no {key}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file (there `1e-05` is a number, as `dvc exp run -S` writes it).

    Raises:
        ParamsError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist: run from the project's root") from None
    except OSError as error:
        raise ParamsError(f"{path} cannot be read: {error.strerror}") from None
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, where: str) -> dict[str, Any]:
    """The mapping in the UTF-8 bytes of a YAML 1.2 file; raises ParamsError, which names `where`, if there is none."""
    try:
        found = YAML(typ="safe", pure=True).load(content.decode("utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(found, dict):
        raise ParamsError(f"{where} must be a mapping of sections, not {type(found).__name__}")
    return found


def load(path: Path, model: type[M], *, whole_file: bool = False) -> M:
    """The sections of a params file that are fields of `model`; with `whole_file`, others are errors.

    Raises:
        ParamsError: with one line for each unknown, missing or mistyped key.
    """
    content = read_yaml(path)
    wanted = content if whole_file else {key: value for key, value in content.items() if key in model.model_fields}
    return validate(wanted, model, where=str(path))


def validate(content: dict[str, Any], model: type[M], *, where: str = "") -> M:
    """`content` as `model`; raises ParamsError with one line for each mistake, which begins with `where`."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        prefix = f"{where}: " if where else ""
        lines = [f"{prefix}{_explain(problem, model)}" for problem in error.errors()]
        raise ParamsError("\n".join(lines)) from None


def _explain(problem: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    match problem["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_suggestion(location, model)}"
        case "missing":
            return f"{key}: missing"
        case _:
            return f"{key}: {problem['msg']} (got {problem['input']!r})"


def _suggestion(location: list[str], model: type[BaseModel]) -> str:
    known = _fields_at(model, location[:-1])
    close = difflib.get_close_matches(location[-1], known, n=1)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (known: {', '.join(known)})" if known else ""


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
