"""The two phases in order; a finished one is reused, an interrupted one resumed.

Each phase has a folder below the work directory, named by what decides its steps: params, backbone, texts, code, and
the adapter of the phase before. So another rate for SimCSE does not train MNTP again.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_config, load_tokenizer
from pipeline.backbone.lora import WEIGHTS_FILE, adapter_parameters, add_adapter, check_adapter, save_adapter
from pipeline.core.artifacts import create, open_artifact
from pipeline.core.code_digest import code_digest
from pipeline.core.errors import ArtifactError, nested_in
from pipeline.core.files import digest_of, file_sha256, write_json
from pipeline.embed.teachers.adapters import merge_adapter
from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
from pipeline.embed.teachers.pooling import check_positions
from pipeline.embed.teachers.template import Pooling, TemplateTokenizer, Tokens
from pipeline.optim.batching import Batches
from pipeline.teach.corpus import TokenizedCorpus, tokenize_corpus
from pipeline.teach.dropout import SeededDropout
from pipeline.teach.loop import Loop, Objective
from pipeline.teach.mntp import MntpObjective, mask_token_id, maskable
from pipeline.teach.params import PhaseName, TeacherLoraParams, TeachParams
from pipeline.teach.simcse import SimcseObjective

log = logging.getLogger(__name__)

VERSION = 1
ADAPTER, CURVE, CHECKPOINT, FINISHED = "adapter", "curve.json", "checkpoint", "finished"
KIND = "finished phase"
# Batches of MNTP that are sorted by length together: its loss is a mean over tokens, so batches may differ in length.
# SimCSE's batches stay random, since their texts are each other's negatives.
MNTP_GROUPING = 8

# An objective and the parameters that it trains, by name.
Training = tuple[Objective, dict[str, Any]]


class TrainedPhase(NamedTuple):
    """A finished phase: its standard LoRA folder, counts for the record, the loss of each step."""

    adapter: Path
    facts: dict[str, Any]
    curve: list[float]

    def summary(self) -> dict[str, Any]:
        """Steps, the mean loss of their first and last tenth, and the facts."""
        tenth = max(1, len(self.curve) // 10)
        return {
            "steps": len(self.curve),
            "first_loss": round(sum(self.curve[:tenth]) / tenth, 6),
            "last_loss": round(sum(self.curve[-tenth:]) / tenth, 6),
            **self.facts,
        }


@dataclass
class Recipe:
    """Trains the adapters of one backbone on some texts; both phases share the loaded model.

    Attributes:
        params: section `teach`.
        texts: see `corpus.hash_ordered`.
        template: of the teacher, for SimCSE, as is `pooling`; see `embed.teachers.template`.
        work: folder of unfinished work.
    """

    params: TeachParams
    backbone: BackboneParams
    texts: Sequence[str]
    template: str
    pooling: Pooling
    work: Path

    def __post_init__(self) -> None:
        """Load the tokenizer and the config.

        Raises:
            BackboneError: tokenizer or config cannot be loaded.
            TeacherError: the mask token is not in the vocabulary, or a token limit exceeds the backbone's positions.
        """
        params, backbone = self.params, self.backbone
        self._identity = identify(backbone.name, backbone.revision)
        self._tokenizer = load_tokenizer(backbone)
        config = load_config(backbone)
        with nested_in("mntp"):
            self._mask_id = mask_token_id(self._tokenizer, params.mntp.mask_token)
            check_positions(config, params.mntp.max_tokens)
        with nested_in("simcse"):
            check_positions(config, params.simcse.max_tokens)

    def run(self) -> dict[str, TrainedPhase]:
        """MNTP, then SimCSE.

        Raises:
            TeacherError: the backbone's attention stays causal, the texts are too few, or a step is not finite.
            TrainingError: the adapters do not fit the backbone.
            BackboneError: the backbone cannot be loaded, or its head is unknown.
            WorkError: the disk is full.
        """
        reading = {"template": self.template, "pooling": self.pooling}
        mntp_texts = self._tokenized("mntp")
        simcse_texts = self._tokenized("simcse", **reading, strip=True)
        mntp = self._phase("mntp", mntp_texts, {}, partial(self._mntp, mntp_texts.rows))
        mntp_lora = self.params.mntp.lora.model_dump()
        upstream = {"mntp": file_sha256(mntp.adapter / WEIGHTS_FILE), "mntp_lora": mntp_lora, **reading}
        train_simcse = partial(self._simcse, simcse_texts.rows, mntp.adapter)
        return {"mntp": mntp, "simcse": self._phase("simcse", simcse_texts, upstream, train_simcse)}

    def _tokenized(self, name: PhaseName, **rules: Any) -> TokenizedCorpus:
        phase = self.params.phase(name)
        with nested_in(name):
            return tokenize_corpus(
                self.texts,
                TemplateTokenizer(self._tokenizer, max_tokens=phase.max_tokens, **rules),
                lambda row: bool(maskable(row)),
                most=phase.steps * phase.batch_size,
                batch_size=phase.batch_size,
                phase=name,
            )

    def _phase(
        self, name: PhaseName, texts: TokenizedCorpus, upstream: dict[str, Any], prepare: Callable[[], Training]
    ) -> TrainedPhase:
        """The phase, from the work folder or trained on what `prepare` gives."""
        folder = self._folder(name, texts, upstream)
        finished = folder / FINISHED
        if is_whole(finished):
            log.info("%s: finished already", name)
        else:
            with nested_in(name):
                self._train(name, texts, prepare(), folder)
        stored = json.loads((finished / CURVE).read_text(encoding="utf-8"))
        counts = {"texts": len(texts.rows), "too_short": texts.short, "repeated": texts.repeated}
        return TrainedPhase(finished / ADAPTER, {**counts, **stored["facts"]}, stored["curve"])

    def _folder(self, name: PhaseName, texts: TokenizedCorpus, upstream: dict[str, Any]) -> Path:
        fingerprint = digest_of(
            {
                "version": VERSION,
                "code": code_digest([__name__]),
                "params": self.params.step_params(name),
                "mask": self._mask_id if name == "mntp" else None,
                "backbone": self._identity,
                "rows": digest_of([[row.ids, row.pooled] for row in texts.rows]),
                **upstream,
            }
        )
        return self.work / f"{name}-{fingerprint[:16]}"

    def _train(self, name: PhaseName, texts: TokenizedCorpus, training: Training, folder: Path) -> None:
        """Train, write the finished phase as an artifact, and delete its checkpoint."""
        (objective, trained), checkpoint, phase = training, folder / CHECKPOINT, self.params.phase(name)
        grouping = MNTP_GROUPING if name == "mntp" else 1
        lengths = [len(row.ids) for row in texts.rows]
        batches = Batches(lengths, phase.batch_size, seed=self.params.seed, grouping=grouping)
        loop = Loop(name, objective, trained, batches, self.params, phase, checkpoint)
        loop.run()
        facts = {
            "trained_parameters": sum(value.numel() for value in trained.values()),
            "dropout_modules": objective.dropout.active,
        }
        with create(folder / FINISHED, kind=KIND, params={}) as out:
            save_adapter(trained, out.path / ADAPTER, _resolved(phase.lora, trained), self.backbone.name)
            write_json(out.path / CURVE, {"facts": facts, "curve": loop.curve})
        checkpoint.unlink(missing_ok=True)

    @cached_property
    def _lm(self) -> Any:
        params, device = self.params, best_device()
        log.info("teach %s: device %s (the best present), %s", self.backbone.name, device, params.dtype)
        return load_backbone(self.backbone.model_copy(update={"dtype": params.dtype}), device)

    def _mntp(self, rows: Sequence[Tokens]) -> Training:
        from pipeline.backbone.output_head import logit_transform

        params, lm = self.params.mntp, self._lm
        transform = logit_transform(lm)  # before attention becomes bidirectional: it runs the causal model
        adapted, trained = self._adapted(self._bidirectional(), params.lora)
        objective = MntpObjective(
            adapted,
            SeededDropout(adapted, 0.0),
            rows,
            head=lm.get_output_embeddings(),
            transform=transform,
            fraction=params.mask_fraction,
            mask_id=self._mask_id,
            micro_batch_size=params.micro_batch_size,
            seed=self.params.seed,
        )
        return objective, trained

    def _simcse(self, rows: Sequence[Tokens], mntp: Path) -> Training:
        params = self.params.simcse
        adapted, trained = self._adapted(merge_adapter(self._bidirectional(), mntp, "mntp"), params.lora)
        dropout = SeededDropout(adapted, params.dropout)
        log.info("simcse: dropout %g in %s", params.dropout, dropout.active or "nothing")
        if params.dropout and not dropout.drops_in_backbone:
            message = "simcse.dropout (%g) has no effect in this architecture: only simcse.lora.dropout (%g) has"
            log.warning(message, params.dropout, params.lora.dropout)
        size, seed = params.micro_batch_size, self.params.seed
        return SimcseObjective(adapted, dropout, rows, scale=params.scale, micro_batch_size=size, seed=seed), trained

    def _bidirectional(self) -> Any:
        body = self._lm.get_decoder()
        make_bidirectional(body)
        check_bidirectional(body, self.backbone.name)
        return body

    def _adapted(self, body: Any, lora: TeacherLoraParams) -> tuple[Any, dict[str, Any]]:
        with nested_in("lora"):
            adapted = add_adapter(body, **lora.model_dump(), seed=self.params.seed)
            check_adapter(adapted, lora.targets)
        return adapted, adapter_parameters(adapted)


def is_whole(finished: Path) -> bool:
    """Whether a phase is finished; False, with a warning, if its folder is damaged."""
    if not finished.is_dir():
        return False
    try:
        open_artifact(finished, KIND)
    except ArtifactError as error:
        log.warning("%s; the phase is trained again", error)
        return False
    return True


def _resolved(lora: TeacherLoraParams, trained: dict[str, Any]) -> TeacherLoraParams:
    """With the names of the layers, so that any loader of adapters finds them."""
    if lora.targets != "all-linear":
        return lora
    return lora.model_copy(update={"targets": sorted({name.split(".")[-3] for name in trained})})
