"""Fixtures: no network, a scratch workspace, tiny random backbones of real architectures built in memory."""

import gc
import os
import signal
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin starve each other when anything else runs; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What a failed test leaves running must not start a Ray of its own; read when ray is imported.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
# A shell that starts the tests in the background has them ignore Ctrl-C, and the stages that they start inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from pipeline.core.run import collect_garbage_rarely

if TYPE_CHECKING:
    from tests.report.browser import Browser

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "data"))
SMALL_LM = ROOT / "models" / "SmolLM2-135M-Instruct"
SMALL_TEACHER = ROOT / "models" / "all-MiniLM-L6-v2"

# An example that a busy machine makes slow is no failure.
hypothesis.settings.register_profile("untimed", deadline=None, database=None)
hypothesis.settings.load_profile("untimed")

HEAVY = {"torch", "transformers", "sentence_transformers", "mteb"}
_frozen: set[str] = set()

collect_garbage_rarely()


def pytest_runtest_setup() -> None:
    """Leave what heavy imports made out of later searches for garbage; the turn of every system ends with one."""
    if HEAVY & sys.modules.keys() - _frozen:
        _frozen.update(HEAVY & sys.modules.keys())
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """At the end of the process libraries report as leaked what was not collected."""
    gc.unfreeze()


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace that is the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIPELINE_WORK_DIR", raising=False)
    return tmp_path


@pytest.fixture
def real_data() -> Path:
    """The folder of shared real data, or a skip that says so."""
    if not REAL_DATA.is_dir():
        pytest.skip("real data not here: set REAL_DATA to its folder")
    return REAL_DATA


@pytest.fixture
def small_lm() -> Path:
    """SmolLM2-135M-Instruct as a local folder."""
    if not SMALL_LM.is_dir():
        pytest.skip("run `make models` first")
    return SMALL_LM


@pytest.fixture
def second_backbone() -> Path:
    """A real backbone of another architecture than SmolLM2's, as a local folder that SECOND_BACKBONE names."""
    folder = os.environ.get("SECOND_BACKBONE")
    if folder is None:
        pytest.skip("SECOND_BACKBONE names no folder of a backbone")
    return Path(folder)


@pytest.fixture
def small_teacher() -> Path:
    """all-MiniLM-L6-v2 as a local folder."""
    if not SMALL_TEACHER.is_dir():
        pytest.skip("run `make models` first")
    return SMALL_TEACHER


CHAT_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level tokenizer with an EOS, no pad token, and (by default) a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|user|>", "<|bot|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = chat_template
    return fast


SMALL_CONFIG: dict[str, Any] = dict(
    vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    bos_token_id=None, eos_token_id=2, pad_token_id=None,
)  # fmt: skip


def tiny_model(architecture: str = "llama", seed: int = 0) -> Any:
    """A random causal LM in fp32, frozen and in eval mode; architecture: llama, qwen3, gemma3, phi3 or olmo2."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Olmo2Config, Phi3Config, Qwen3Config

    config = {
        "llama": lambda: LlamaConfig(**SMALL_CONFIG),
        "qwen3": lambda: Qwen3Config(**SMALL_CONFIG),
        "phi3": lambda: Phi3Config(**SMALL_CONFIG),
        "olmo2": lambda: Olmo2Config(**SMALL_CONFIG),
        "gemma3": lambda: Gemma3TextConfig(
            **SMALL_CONFIG, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
        ),
    }[architecture]()
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_backbone("qwen3")` is a folder with a tiny random backbone and its tokenizer."""
    made: dict[tuple[str, bool], Path] = {}

    def make(architecture: str = "llama", chat: bool = True) -> Path:
        if (architecture, chat) not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{'chat' if chat else 'plain'}")
            tiny_model(architecture).save_pretrained(folder)
            tiny_tokenizer(CHAT_TEMPLATE if chat else None).save_pretrained(folder)
            made[architecture, chat] = folder
        return made[architecture, chat]

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Browser]":
    """A headless Chromium, or a skip that says so."""
    from tests.report.browser import find_chromium, running

    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here: the page is not opened")
    with running(chromium, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
