"""What makes an encoder folder one of sentence-transformers: its own module file, modules.json, prompts."""

import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.backbone.prompting import join_instruction
from pipeline.core.files import write_json
from pipeline.tasks.instructions import Instructions, load_instructions

MODULE = "pipeline.encoder.folder.st_module"
MODULE_CLASS = "LLM2VecGenEncoder"
# sentence-transformers checks these before it loads anything. The lowest versions that the module file was run with.
REQUIREMENTS = {
    "sentence-transformers": {"specifier": ">=5.4", "reason": "its module classes have moved"},
    "transformers": {"specifier": ">=5.19", "reason": "earlier ones may tokenise or load a backbone otherwise"},
}
# What peft must be able to read.
_PEFT = {"specifier": ">=0.17", "reason": "this encoder has LoRA adapters"}


def write_st_files(folder: Path, *, lora: bool) -> None:
    """Write the module file, byte for byte, and the configs that name it; `lora`: the folder has adapters."""
    source = module_file()
    shutil.copyfile(source, folder / source.name)
    module = {"idx": 0, "name": "0", "path": "", "type": f"{source.stem}.{MODULE_CLASS}"}
    write_json(folder / "modules.json", [module])
    write_json(folder / "config_sentence_transformers.json", _config(lora))


def module_file() -> Path:
    """The file that every folder gets a copy of."""
    spec = find_spec(MODULE)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


def _config(lora: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": st_prompts(load_instructions()),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "requirements": {**REQUIREMENTS, **({"peft": _PEFT} if lora else {})},
        # Under the names that sentence-transformers writes itself: it warns where an older one reads a newer folder.
        "__version__": {
            "sentence_transformers": version("sentence-transformers"),
            "transformers": version("transformers"),
            "pytorch": version("torch"),
        },
    }
    return config


def st_prompts(instructions: Instructions) -> dict[str, str]:
    """Prompts by name, with which mteb gives each side of a task the instruction that `Instructions.choose` does.

    `query` and `document` are for `encode_query` and `encode_document`; the others are named by mteb's task types and
    tasks, with `-document` appended for the texts that are searched.
    """
    chosen = {"query": instructions.types["Retrieval"].query, "document": instructions.document}
    for name, entry in {**instructions.types, **instructions.tasks}.items():
        chosen[name] = entry.query
        chosen[f"{name}-document"] = instructions.document if entry.document is None else entry.document
    # A prompt and a text are put together as they are, so the space is the prompt's.
    return {name: join_instruction(instruction, "") for name, instruction in chosen.items()}
