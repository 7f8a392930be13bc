"""The tokenizer files of a model folder, as any version of transformers from 4 on reads them."""

import json
from pathlib import Path
from typing import Any

from pipeline.core.files import write_json

# Where the tokenizer was loaded from, which is no part of it.
_ORIGIN = ("is_local", "local_files_only")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer, whose generic class transformers 5 names TokenizersBackend, by the name that 4 knows too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in _ORIGIN}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, settings)
