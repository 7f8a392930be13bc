"""A workspace of tiny random models, in which every stage takes a second or two, and a journal of computed rows."""

import contextlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.fault_campaign.processes import Journal, Work

ROWS = 24
WORDS = ("apple", "bread", "cloud", "dough", "eagle", "fjord", "grape", "house")
# A commit of a row store, and the chunk that embed passes on at once: what one kill may cost.
INTERVAL = 4
# Stage and argument, in the order of the pipeline.
STAGES: dict[str, Sequence[str]] = {
    "collect": (),
    "generate": (),
    "teach": (),
    "embed": (),
    "train": (),
    "evaluate": ("small",),
    "probe": ("safety",),
    "report": (),
}


def params(backbone: Path) -> dict[str, Any]:
    """The params file: echo engine, hash teacher, a student of two steps an epoch."""
    return {
        "backbone": {"name": str(backbone), "dtype": "float32"},
        "collect": {
            "local_dir": "data/sources",
            "sources": [{"kind": "local", "path": "queries.jsonl"}],
            "heldout_fraction": 0.2,
            "max_tokens": 64,
            "near_duplicates": {},
        },
        "generate": {"engine": "echo", "dtype": "float32", "max_new_tokens": 32, "max_prompt_tokens": 48},
        "embed": {
            "teacher": {"kind": "hash", "options": {"width": 6}},
            "normalize": False,
            "dtype": "float32",
        },
        "train": {
            "compression_tokens": 2, "thought_tokens": 0, "template": "chat", "max_query_tokens": 64,
            "max_response_tokens": 64, "align_weight": 1.0, "recon_weight": 1.0, "align_reduction": "sum",
            "warm_start": {"enabled": False}, "learning_rate": 0.01, "weight_decay": 0.0, "warmup_steps": 1,
            "epochs": 1, "batch_size": 6, "micro_batch_size": 6, "max_grad_norm": 1.0, "checkpoint_every": 1, "seed": 0,
        },
        "evaluate": {
            "systems": ["student", "teacher"], "local_dir": "data/tasks", "dtype": "float32",
            "bootstrap": {"resamples": 100},
        },
        "suites": {"small": {"local": ["find"]}},
        "probes": {"safety": {"local": "find", "top_k": [1]}},
        "report": {"title": "faults", "audit": True},
    }  # fmt: skip


def params_of_teach(backbone: Path) -> dict[str, Any]:
    """The params file of `teach`: the teacher is trained. What it makes is attacked, and read by no other stage."""
    phase = {
        "steps": 3, "batch_size": 4, "micro_batch_size": 4, "max_tokens": 40, "learning_rate": 0.01,
        "lora": {"rank": 2, "alpha": 4.0},
    }  # fmt: skip
    return {
        **params(backbone),
        "embed": {"teacher": {"kind": "llm2vec-trained", "max_tokens": 64, "batch_tokens": 512}, "dtype": "float32"},
        "teach": {
            "mntp": phase, "simcse": phase, "dtype": "float32", "checkpoint_every": 1, "quality": {"texts": 8},
        },
    }  # fmt: skip


def make(folder: Path, backbone: Path) -> None:
    """Sources, a task and params in an empty folder."""
    sources = folder / "data" / "sources"
    sources.mkdir(parents=True)
    texts = [f"what is the {WORDS[index % 8]} number {index} and why?" for index in range(ROWS)]
    (sources / "queries.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = folder / "data" / "tasks" / "find"
    task.mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        "corpus": [{"_id": word, "text": f"{word} is a word"} for word in WORDS],
        "queries": [{"_id": f"q-{word}", "text": f"{word} what is it?"} for word in WORDS],
        "default": [{"query-id": f"q-{word}", "corpus-id": word, "score": 1} for word in WORDS],
    }
    split = {"corpus": "corpus", "queries": "queries", "default": "test"}
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - {{split: {split[name]}, path: {name}.jsonl}}\n" for name in rows
    )
    (task / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name, content in rows.items():
        (task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "params.yaml").write_text(json.dumps(params(backbone)))
    (folder / "teach.yaml").write_text(json.dumps(params_of_teach(backbone)))


def make_backbone(folder: Path) -> None:
    """A random two-layer Llama and a byte-level tokenizer with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), ["<|user|>", "<|bot|>", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = (
        "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def stage(name: str) -> Work:
    """The stage as its command runs it, in the current folder."""
    module = importlib.import_module(f"pipeline.{name}.__main__")
    return lambda: module.main(*STAGES[name], Path("teach.yaml" if name == "teach" else "params.yaml"))


def note_imports(path: Path) -> None:
    """In a child at its end: write the names of all modules."""
    path.write_text("\n".join(sys.modules))


def import_noted(path: Path) -> None:
    """The modules that a child had, once for all children; nothing is computed, so forking stays safe."""
    for name in path.read_text().splitlines():
        if name not in sys.modules and not name.startswith(("__", "transformers_modules")):
            with contextlib.suppress(Exception):  # some are made by others and have no file
                importlib.import_module(name)


def prepare_child(journal: Journal) -> None:
    """In a child: short work, commits every INTERVAL rows, and a note of each row, text and training step computed."""
    from pipeline.collect import spill
    from pipeline.core import row_store, run
    from pipeline.embed.teachers.stub import HashTeacher
    from pipeline.generate.engines.echo import EchoEngine

    spill.BUCKETS = 4
    run.environment = lambda: {"python": "", "versions": {}, "cores": 1, "memory_gib": 1.0, "gpus": []}
    for name in ("pipeline.teach.recipe", "pipeline.train.__main__"):
        if name in sys.modules:  # half of such a short stage: reading the code, which stays as it is
            sys.modules[name].code_digest = _code_digest  # type: ignore[attr-defined]
    real_store = row_store.ShardStore.__init__

    def store(self: Any, *arguments: Any, **keys: Any) -> None:
        real_store(self, *arguments, **{"flush_rows": INTERVAL, "flush_seconds": 3600.0, **keys})

    row_store.ShardStore.__init__ = store  # type: ignore[method-assign]
    for name, constant in (
        ("pipeline.embed.build", "CHUNK_TEXTS"),
        ("pipeline.evaluate.embedding_cache", "CHUNK_TEXTS"),
    ):
        if name in sys.modules:
            setattr(sys.modules[name], constant, INTERVAL)
    real_generate = EchoEngine.generate

    def generate(self: Any, prompts: Any, sampling: Any) -> Iterator[Any]:
        for completion in real_generate(self, prompts, sampling):
            journal.add([completion.id])
            yield completion

    EchoEngine.generate = generate  # type: ignore[method-assign]
    HashTeacher.embed = _noting(HashTeacher.embed, journal)  # type: ignore[method-assign]
    for name in ("pipeline.train.trainer", "pipeline.teach.loop", "pipeline.evaluate.system"):
        if name in sys.modules:
            _note_work(sys.modules[name], journal)


def _code_digest(modules: Sequence[str]) -> str:
    return f"the code of {', '.join(modules)}"


def _note_work(module: Any, journal: Journal) -> None:
    """Note the steps or texts of the class in a module that computes them."""
    if hasattr(module, "InstructedSystem"):
        module.InstructedSystem.encode = _noting(module.InstructedSystem.encode, journal)
        return
    kind = module.Trainer if hasattr(module, "Trainer") else module.Loop
    real_step = kind._step

    def step(self: Any, step: int, *batch: Any) -> Any:
        found = real_step(self, step, *batch)
        journal.add([f"{getattr(self, 'name', 'train')} step {step}"])
        return found

    kind._step = step


def _noting(real: Callable[..., Any], journal: Journal) -> Callable[..., Any]:
    def call(self: Any, texts: Sequence[str], *arguments: Any, **keys: Any) -> Any:
        found = real(self, texts, *arguments, **keys)
        journal.add(f"{type(self).__name__} {text}" for text in texts)
        return found

    return call


def copy(source: Path, target: Path) -> None:
    """A fresh copy of a workspace."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


OUTPUTS = {
    "collect": "data/queries",
    "generate": "data/responses",
    "teach": "models/teacher",
    "embed": "data/targets",
    "train": "models/encoder",
    "evaluate": "results/evaluate/small",
    "probe": "results/probe/safety",
    "report": "results/report.md",
}


def lost_rows(stage: str, made: Path, reference: Path) -> int:
    """Rows of the reference's artifact that `made` lacks or has otherwise; another difference of a file counts as 1."""
    import pyarrow.parquet as pq

    if stage == "report":  # holds times: that it is whole must do
        return 0 if (made / OUTPUTS[stage]).read_text().rstrip().endswith(_last_line(reference / OUTPUTS[stage])) else 1
    lost, ours, theirs = 0, made / OUTPUTS[stage], reference / OUTPUTS[stage]
    names = {path.relative_to(folder) for folder in (ours, theirs) for path in folder.rglob("*") if path.is_file()}
    for name in names:
        one, other = ours / name, theirs / name
        if one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes():
            continue
        rows = 0
        if other.suffix == ".parquet" and other.is_file():
            wanted = [json.dumps(row, default=str) for row in pq.read_table(other).to_pylist()]
            found = {json.dumps(row, default=str) for row in pq.read_table(one).to_pylist()} if one.is_file() else set()
            rows = sum(row not in found for row in wanted)
        lost += max(1, rows)
    return lost


def _last_line(page: Path) -> str:
    return page.read_text().rstrip().splitlines()[-1]
