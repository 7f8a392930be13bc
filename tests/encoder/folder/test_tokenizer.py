"""The tokenizer of a folder: the same tokens, under a class that transformers 4 knows too."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from pipeline.encoder.folder.tokenizer import save_tokenizer
from tests.export.encoder_folders import write_folder

TEXTS = ["", "plain", "<|end|> ünïcode ✓", "  spaces  "]


def test_the_class_is_portable_and_the_place_it_came_from_is_left_out(
    tmp_path: Path, tiny_backbone: Callable[..., Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone("llama"))
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & settings.keys()
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (read.eos_token, read.chat_template) == (tokenizer.eos_token, tokenizer.chat_template)


def test_an_encoder_folder_does_not_depend_on_where_the_tokenizer_was(
    tmp_path: Path, tiny_backbone: Callable[..., Path]
) -> None:
    text = (write_folder(tmp_path / "encoder", tiny_backbone("qwen3")) / "tokenizer_config.json").read_text()
    assert "TokenizersBackend" not in text and "local" not in text
