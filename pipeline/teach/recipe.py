"""The two phases in order, each kept when it is finished and gone on with when it was killed.

A phase has a folder of its own below the work directory, named by all that decides its steps: params, backbone, texts,
the adapter before it, and the code. So another rate for SimCSE does not train MNTP again.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, identify, load_backbone, load_config, load_tokenizer
from pipeline.backbone.lora import WEIGHTS_FILE, adapter_parameters, add_adapter, save_adapter
from pipeline.core.artifacts import digest_of, disk_errors, file_sha256, write_json
from pipeline.core.code_digest import code_digest
from pipeline.core.errors import TeacherError, TrainingError
from pipeline.embed.teachers.adapters import merge_adapter
from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
from pipeline.embed.teachers.pooling import check_positions
from pipeline.embed.teachers.template import Pooling, Reader, Tokens
from pipeline.optim.batching import Batches
from pipeline.teach.corpus import Read, read_corpus
from pipeline.teach.dropout import Noise
from pipeline.teach.loop import Loop, Objective, Schedule
from pipeline.teach.mntp import MntpObjective, mask_token_id, maskable
from pipeline.teach.params import PhaseName, PhaseParams, TeacherLoraParams, TeachParams
from pipeline.teach.simcse import SimcseObjective

log = logging.getLogger(__name__)

VERSION = 1
ADAPTER, CURVE, CHECKPOINT, FINISHED = "adapter", "curve.json", "checkpoint", "finished"
# Batches of MNTP whose texts are sorted by length together; its loss is one of tokens, so they may differ in length.
# A batch of SimCSE stays random, for its texts are each other's negatives, and is sorted within.
MNTP_GROUPING = 8


@dataclass(frozen=True)
class Finished:
    """A phase that is done.

    Attributes:
        adapter: a standard LoRA folder.
        facts: for the record.
        curve: the loss of each step.
    """

    adapter: Path
    facts: dict[str, Any]
    curve: list[float]


class Recipe:
    """Trains the adapters of one backbone on some texts; what is loaded once serves both phases."""

    def __init__(
        self,
        params: TeachParams,
        backbone: BackboneParams,
        texts: Sequence[str],
        *,
        template: str,
        pooling: Pooling,
        work: Path,
    ) -> None:
        """Load the tokenizer and the config.

        Args:
            params: section `teach`.
            backbone: whose teacher it is.
            texts: see `corpus.in_order`.
            template: what SimCSE reads, as the teacher will, see `teachers.reading`.
            pooling: which tokens of it, as the teacher will.
            work: folder of unfinished work.

        Raises:
            BackboneError: tokenizer or config cannot be loaded.
            TeacherError: the vocabulary has no such mask token, or a limit of tokens exceeds the backbone's positions.
        """
        self._params, self._backbone, self._texts, self._work = params, backbone, texts, work
        self._template, self._pooling = template, pooling
        self._identity = identify(backbone.name, backbone.revision)
        self._tokenizer = load_tokenizer(backbone)
        self._mask_id = mask_token_id(self._tokenizer, params.mntp.mask_token)
        config = load_config(backbone)
        for phase, limit in (("mntp", params.mntp.max_tokens), ("simcse", params.simcse.max_tokens)):
            check_positions(config, limit, "backbone", key=f"teach.{phase}.max_tokens")

    def run(self) -> tuple[Finished, Finished]:
        """Both phases, MNTP first.

        Raises:
            TeacherError: the backbone's attention stays causal, the texts are too few, or a step is not finite.
            BackboneError: the backbone cannot be loaded, or its head is unknown.
            WorkError: the disk is full.
        """
        params = self._params
        mntp_rows = self._rows("mntp", params.mntp, Reader(self._tokenizer, max_tokens=params.mntp.max_tokens))
        reader = Reader(
            self._tokenizer,
            max_tokens=params.simcse.max_tokens,
            template=self._template,
            pooling=self._pooling,
            strip=True,
        )
        simcse_rows = self._rows("simcse", params.simcse, reader)
        mntp = self._phase("mntp", params.mntp, mntp_rows, {}, lambda: self._mntp(mntp_rows.rows))
        # Everything but the weights that come before is in the phase's own params.
        before = {"mntp": file_sha256(mntp.adapter / WEIGHTS_FILE), "mntp_lora": params.mntp.lora.model_dump()}
        reading = {"template": self._template, "pooling": self._pooling}
        simcse = self._phase(
            "simcse",
            params.simcse,
            simcse_rows,
            before | reading,
            lambda: self._simcse(simcse_rows.rows, mntp.adapter),
        )
        return mntp, simcse

    def _rows(self, name: PhaseName, phase: PhaseParams, reader: Reader) -> Read:
        return read_corpus(
            self._texts,
            reader,
            lambda row: bool(maskable(row)),
            at_most=phase.steps * phase.batch_size,
            batch_size=phase.batch_size,
            phase=name,
        )

    def _phase(
        self,
        name: PhaseName,
        phase: PhaseParams,
        read: Read,
        before: dict[str, Any],
        objective: "Callable[[], tuple[Objective, dict[str, Any], dict[str, Any]]]",
    ) -> Finished:
        """The phase, from the work folder or trained; `objective` gives its parameters and facts as well."""
        folder = self._folder(name, read, before)
        done = folder / FINISHED
        if not done.is_dir():
            built, trained, facts = objective()
            grouping = MNTP_GROUPING if name == "mntp" else 1
            batches = Batches(read.lengths, phase.batch_size, seed=self._params.seed, grouping=grouping)
            loop = Loop(name, built, trained, batches, self._schedule(phase), folder / CHECKPOINT)
            loop.run()
            self._keep(done, trained, phase.lora, {"facts": facts, "curve": loop.curve})
        else:
            log.info("%s: finished already", name)
        kept = json.loads((done / CURVE).read_text(encoding="utf-8"))
        counted = {"texts": len(read.rows), "too_short": read.short, "repeated": read.repeated}
        return Finished(done / ADAPTER, {**counted, **kept["facts"]}, kept["curve"])

    def _folder(self, name: PhaseName, read: Read, before: dict[str, Any]) -> Path:
        fingerprint = digest_of(
            {
                "version": VERSION,
                "code": code_digest([__name__]),
                "params": self._params.steps_of(name),
                "mask": self._mask_id if name == "mntp" else None,
                "backbone": self._identity,
                "rows": digest_of([[row.ids, row.pooled] for row in read.rows]),
                **before,
            }
        )
        return self._work / f"{name}-{fingerprint[:16]}"

    def _schedule(self, phase: PhaseParams) -> Schedule:
        params = self._params
        return Schedule(
            steps=phase.steps,
            learning_rate=phase.learning_rate,
            shape=params.schedule,
            warmup_steps=params.warmup_steps,
            weight_decay=params.weight_decay,
            max_grad_norm=params.max_grad_norm,
            checkpoint_every=params.checkpoint_every,
        )

    def _keep(self, done: Path, trained: dict[str, Any], lora: TeacherLoraParams, facts: dict[str, Any]) -> None:
        """Write the finished phase in one rename, and let go of its checkpoint."""
        scratch = done.with_name(f"{FINISHED}.tmp")
        with disk_errors(done):
            shutil.rmtree(scratch, ignore_errors=True)
            save_adapter(trained, scratch / ADAPTER, _resolved(lora, trained), self._backbone.name)
            write_json(scratch / CURVE, facts)
            scratch.rename(done)
            (done.parent / CHECKPOINT).unlink(missing_ok=True)

    @cached_property
    def _lm(self) -> Any:
        """The backbone, with bidirectional attention that was verified."""
        params, device = self._params, best_device()
        log.info("teach %s: device %s (the best present), %s", self._backbone.name, device, params.dtype)
        return load_backbone(self._backbone.model_copy(update={"dtype": params.dtype}), device)

    def _mntp(self, rows: Sequence[Tokens]) -> tuple[Objective, dict[str, Any], dict[str, Any]]:
        from pipeline.backbone.output_head import logit_transform

        params, lm = self._params.mntp, self._lm
        shape = logit_transform(lm)  # as the causal model that its config describes
        body = self._bidirectional()
        adapted, trained = self._adapted(body, "mntp", params.lora)
        noise = Noise(adapted, 0.0)
        objective = MntpObjective(
            adapted,
            noise,
            rows,
            head=lm.get_output_embeddings(),
            shape=shape,
            fraction=params.mask_fraction,
            mask_id=self._mask_id,
            micro_batch_size=params.micro_batch_size,
            seed=self._params.seed,
        )
        return objective, trained, _facts(trained, noise)

    def _simcse(self, rows: Sequence[Tokens], mntp: Path) -> tuple[Objective, dict[str, Any], dict[str, Any]]:
        params = self._params.simcse
        body = merge_adapter(self._bidirectional(), mntp, "mntp")
        adapted, trained = self._adapted(body, "simcse", params.lora)
        noise = Noise(adapted, params.dropout)
        log.info("simcse: dropout %g in %s", params.dropout, noise.active or "nothing")
        if params.dropout and not noise.architecture:
            log.warning(
                "teach.simcse.dropout (%g) finds nothing in this architecture that drops: the two readings of a text "
                "differ by the dropout of LoRA's inputs alone (teach.simcse.lora.dropout, %g)",
                *(params.dropout, params.lora.dropout),
            )
        objective = SimcseObjective(
            adapted,
            noise,
            rows,
            scale=params.scale,
            micro_batch_size=params.micro_batch_size,
            seed=self._params.seed,
        )
        return objective, trained, _facts(trained, noise)

    def _bidirectional(self) -> Any:
        body = self._lm.get_decoder()
        make_bidirectional(body)
        check_bidirectional(body, self._backbone.name)
        return body

    def _adapted(self, body: Any, name: PhaseName, lora: TeacherLoraParams) -> tuple[Any, dict[str, Any]]:
        try:
            adapted = add_adapter(body, **lora.model_dump(), seed=self._params.seed)
        except TrainingError as error:
            raise TeacherError(str(error).replace("train.lora.", f"teach.{name}.lora.")) from None
        return adapted, adapter_parameters(adapted)


def _facts(trained: dict[str, Any], noise: Noise) -> dict[str, Any]:
    parameters = sum(value.numel() for value in trained.values())
    return {"trained_parameters": parameters, "dropout_modules": noise.active}


def _resolved(lora: TeacherLoraParams, trained: dict[str, Any]) -> TeacherLoraParams:
    """With the names of the layers, so that any loader of adapters finds them, whatever model it puts them on."""
    if lora.targets != "all-linear":
        return lora
    return lora.model_copy(update={"targets": sorted({name.split(".")[-3] for name in trained})})
