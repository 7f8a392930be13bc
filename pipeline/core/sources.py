"""What sources of texts held when they were read: a digest of each, for the manifest, which an audit compares later."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline.core.errors import SourceError
from pipeline.core.files import digest_of, file_sha256
from pipeline.core.readers import HubSource, LocalSource, find_files, read_texts

HUB = "hub:"


class SourceDigests:
    """The digests of sources as they are read.

    A local source is known by its path from the workspace, and by the sha256 of its file. A data set of the hub is
    known by its name, and by the sha256 of the texts that were read: its files are never here.
    """

    def __init__(self, local_dir: Path) -> None:
        """Relative paths start at `local_dir`."""
        self.found: dict[str, str] = {}
        self._local_dir = local_dir

    def read(self, source: LocalSource | HubSource) -> Iterator[str]:
        """The texts of a source, see `read_texts`; its digest is known once all of them were read."""
        if isinstance(source, HubSource):
            digest = hashlib.sha256()
            for text in read_texts(source, self._local_dir):
                digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
                yield text
            self.found[_hub_name(source)] = digest.hexdigest()
        else:
            yield from read_texts(source, self._local_dir)
            path = self._local_dir / source.path
            if (found := path_sha256(path)) is not None:
                self.found[path.as_posix()] = found


def path_sha256(path: Path) -> str | None:
    """The sha256 of a file, or of the names and digests of the files that a folder or a pattern names.

    None if there is none.
    """
    if path.is_file():
        return file_sha256(path)
    try:
        return digest_of([[file.path.name, file_sha256(file.path)] for file in find_files(path)])
    except SourceError:
        return None


def is_within(path: Path, folder: Path) -> bool:
    """Whether a file or folder lies in `folder`, also once links to folders are followed, which DVC does not."""
    place = path if path.is_dir() else path.parent
    return place.resolve().is_relative_to(folder.resolve())


def changed(sources: Mapping[str, str], root: Path) -> tuple[dict[str, str], list[str]]:
    """Local sources that differ from their digests, with the present ones, and those that are not there."""
    present = {name: path_sha256(root / name) for name in sources if not name.startswith(HUB)}
    return (
        {name: found for name, found in present.items() if found is not None and found != sources[name]},
        [name for name, found in present.items() if found is None],
    )


def _hub_name(source: HubSource) -> str:
    return "/".join([f"{HUB}{source.name}", source.config or "default", source.split, source.column])
