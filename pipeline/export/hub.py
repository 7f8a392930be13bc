"""Give a run's artifacts away on the hub: `python -m pipeline push FOLDER ORG/NAME`."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.artifacts import Artifact, open_artifact, read_manifest
from pipeline.core.errors import SourceError, first_line
from pipeline.encoder.folder.card import CARD_FILE
from pipeline.export.publish import publish

# What the rows of a data set are; other artifacts are no data set.
_DATA_SETS = {
    "queries": "queries of a language model, cleaned and split",
    "responses": "answers of a language model to queries, from which an LLM2Vec-Gen student is trained",
    "targets": "a teacher's embeddings of these answers: what an LLM2Vec-Gen student learns to predict from the query",
}
_DATA_CARD = """\
---
{license}configs:
{configs}---
# {title}

{rows:,} rows: {meaning}. Written by the LLM2Vec-Gen pipeline; `manifest.json` has the sha256 of each file, the
params and the digests of what it was made from.

## Models

{models}

## Params

```json
{params}
```
"""


def push(
    folder: Path,
    repository: str,
    *,
    results: Path | None = None,
    license: str | None = None,
    private: bool = False,
    branch: str | None = None,
) -> str:
    """Upload an encoder as a model, or queries, responses or targets as a data set; gives the address of the commit.

    The token is the hub's own (`hf auth login` or HF_TOKEN). An encoder is uploaded as `publish` writes it, with the
    scores of `results` in its card. `license` is the hub's name of one; null: the card names none.

    Raises:
        SourceError: the hub refused, or the artifact is of another kind.
        ArtifactError: the artifact is missing or damaged.
    """
    kind = read_manifest(folder).manifest.kind
    if kind == "encoder":
        _check_backbone(folder)
        with tempfile.TemporaryDirectory() as scratch:
            published = Path(scratch) / repository.rpartition("/")[2]
            publish(folder, published, results)
            card = published / CARD_FILE
            text = card.read_text(encoding="utf-8").replace(json.dumps(published.name), json.dumps(repository))
            card.write_text(_with_license(text, license), encoding="utf-8")
            return _upload(published, repository, "model", private, branch)
    if kind not in _DATA_SETS:
        raise SourceError(f"{folder} is a {kind}: push takes an encoder, {', '.join(_DATA_SETS)}")
    artifact = open_artifact(folder, kind)
    with tempfile.TemporaryDirectory() as scratch:
        card = Path(scratch) / CARD_FILE
        card.write_text(data_card(artifact, repository, license), encoding="utf-8")
        return _upload(folder, repository, "dataset", private, branch, card)


def data_card(artifact: Artifact, title: str, license: str | None) -> str:
    """The card of a data set, in the hub's format: its splits, what made it, and its params."""
    manifest = artifact.manifest
    return _DATA_CARD.format(
        license=f"license: {license}\n" if license else "",
        configs=_configs(sorted(name for name in manifest.files if name.endswith(".parquet"))),
        title=title,
        rows=manifest.rows,
        meaning=_DATA_SETS[manifest.kind],
        models="\n".join(f"- {role}: {_pairs(identity)}" for role, identity in manifest.models.items()) or "None.",
        params=json.dumps(manifest.params, indent=2, sort_keys=True, ensure_ascii=False),
    )


def _configs(files: list[str]) -> str:
    """Splits as the hub reads them: each table of the queries by its name, the parts of others together."""
    parts = [name for name in files if name.startswith("part-")]
    splits = {"train": "part-*.parquet"} if parts else {Path(name).stem: name for name in files}
    entries = "".join(f"      - split: {split}\n        path: {path!r}\n" for split, path in splits.items())
    return f"  - config_name: default\n    data_files:\n{entries}"


def _pairs(identity: Any) -> str:
    if not isinstance(identity, Mapping):
        return str(identity)
    return ", ".join(f"{key} `{value}`" for key, value in identity.items())


def _with_license(card: str, license: str | None) -> str:
    return card.replace("---\n", f"---\nlicense: {license}\n", 1) if license else card


def _check_backbone(encoder: Path) -> None:
    """Raises SourceError where the backbone is a folder of this machine, which nobody else can load."""
    from pipeline.encoder.folder.read import read_config

    backbone = read_config(encoder).backbone
    if "sha256" in backbone:
        raise SourceError(
            f"{encoder} was trained on the folder {backbone['name']}, which others do not have: train on the "
            "hub's name and revision, or give the folder away by export-st or export-merged"
        )


def _upload(
    folder: Path, repository: str, kind: str, private: bool, branch: str | None, card: Path | None = None
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if card is not None:
        files[CARD_FILE] = card
    with _hub_errors(repository):
        api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, repo_type=kind, branch=branch, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        commit = api.create_commit(
            repository, operations, repo_type=kind, revision=branch, commit_message=f"Upload {folder.name}"
        )
    return str(commit.commit_url)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """What the hub's client raises, as one line."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise SourceError(f"no token for '{repository}': `hf auth login`, or set HF_TOKEN") from None
    except HFValidationError as error:
        raise SourceError(f"'{repository}' is no name of a repository: {error}", argument="repository") from None
    except HfHubHTTPError as error:
        reason = error.server_message or first_line(error)
        status = error.response.status_code if error.response is not None else "no status"
        hint = ": `hf auth login`, or set HF_TOKEN" if status in (401, 403) else ""
        raise SourceError(f"the hub refused '{repository}' ({status}: {reason}){hint}") from None
    except HTTPError as error:
        raise SourceError(f"the hub cannot be reached ({type(error).__name__}: {error})") from None
