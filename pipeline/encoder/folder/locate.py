"""Where an encoder is: a folder of this machine, or a repository of the hub."""

import re
from pathlib import Path

from pipeline.core.errors import TrainingError, first_line

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def encoder_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder `name`, or the downloaded files of the hub's model `ORG/NAME` at a revision.

    A name is the hub's where its first part is no folder here: `models/encoder` that is not made yet is no repository.

    Raises:
        TrainingError: the hub does not have it or cannot be reached, or a folder is given with a revision.
    """
    path = Path(name).expanduser()
    on_hub = not path.exists() and not path.parent.is_dir() and _REPOSITORY.fullmatch(str(name)) is not None
    if not on_hub:
        if revision is not None:
            raise TrainingError(f"{name} is a folder, a revision is of the hub", argument="revision")
        return path
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), revision=revision))
    except HFValidationError as error:
        message = f"there is no folder '{name}' here, and it is no name of the hub's: {first_line(error)}"
        raise TrainingError(message) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError) as error:
        message = f"there is no folder '{name}' here, and the hub did not give it: {first_line(error)}"
        raise TrainingError(message) from None
