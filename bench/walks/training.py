"""A training step on the fake GPU: forward, backward and optimiser."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

from bench.fake_gpu import models
from bench.fake_gpu.device import DEVICE
from bench.fake_gpu.meter import H100, Meter
from bench.fake_gpu.simulation import simulated

COMPRESSION_TOKENS = 10


class _Uncompared:
    """For `select.Comparison`: takes the first candidate."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is run."""

    def first_equal(self, candidates: Iterator[tuple[str, Any]]) -> Any:
        """The fastest that the backbone's structure allows."""
        return next((candidate for _, candidate in candidates), None)


@dataclass(frozen=True)
class TrainingStep:
    """One step and how it is trained.

    Attributes:
        rows: of the step, in `micro_batches` response passes and, with `queries_apart`, as many query passes.
        query: tokens of each query, of which `shared` are common to all.
        response: tokens of each response.
        recompute_gates: share of the layers; None: as shipped.
        lora: rank of adapters on the query pass; 0: none.
        compared: passes are compared with the plain ones first; else the fastest are taken, which is quicker.
    """

    rows: int = 16
    micro_batches: int = 1
    queries_apart: bool = False
    query: int = 512
    response: int = 512
    shared: int = 3
    attention: Any = "auto"
    checkpoint_responses: bool = False
    recompute_gates: float | None = None
    lora: int = 0
    compared: bool = True

    def walk(self, config: Any, mode: Any) -> dict[str, Any]:
        """The numbers of a step, beside the plan's estimate."""
        import torch

        from pipeline.backbone.attention.segments import index_tensors
        from pipeline.encoder.passes import select
        from pipeline.encoder.student import new_student
        from pipeline.optim.gradients import adamw, update

        model, meter = models.fake_model(config, mode), Meter()
        with simulated(mode, meter):
            for tensor in (*model.parameters(), *model.buffers()):
                meter.add(tensor)
            student = new_student(
                model, config.hidden_size, compression_tokens=COMPRESSION_TOKENS, thought_tokens=0, seed=0
            )
            with nullcontext() if self.compared else mock.patch.object(select, "Comparison", _Uncompared):
                passes, adapters = self._passes(model)
            trained = {f"student.{name}": value for name, value in student.named_parameters()} | adapters
            optimizer = adamw(trained, rate=1e-3, weight_decay=0.0)
            for parameter in trained.values():  # a step on zeros makes the optimiser's state
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            meter.reset()
            index_tensors.cache_clear()  # batches of a run differ
            meter.phase("losses")
            losses = self._losses(student, passes, torch.zeros(2, dtype=torch.float64, device=DEVICE))
            meter.phase("optimizer")
            norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
            values = torch.cat([losses, norm[None].to(losses)])
            update(optimizer, values)
            values.to("cpu")  # what a run reads of a step
        return self._numbers(config, meter)

    def _passes(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """The passes, and the parameters of the adapters."""
        from pipeline.backbone.lora import adapter_parameters, add_adapter
        from pipeline.encoder.passes.adapted import AdaptedQueryPass
        from pipeline.encoder.passes.plain import Passes
        from pipeline.encoder.passes.select import make_passes

        options = self._pass_params.model_dump()
        passes = make_passes(model, **options)
        if not self.lora:
            return passes, {}
        adapted = add_adapter(model, rank=self.lora, alpha=16.0, dropout=0.0, targets="all-linear", seed=0)
        query_pass = make_passes(adapted, **{**options, "frozen_prefix": False}).query_pass
        return Passes(AdaptedQueryPass(query_pass, adapted), passes.response_pass), adapter_parameters(adapted)

    @property
    def _pass_params(self) -> Any:
        """Section `train.passes`: the defaults, but for what is set here."""
        from pipeline.train.params import PassParams

        given = {name: getattr(self, name) for name in ("attention", "checkpoint_responses", "recompute_gates")}
        return PassParams(**{name: value for name, value in given.items() if value is not None})

    @property
    def _rows_each(self) -> int:
        return -(-self.rows // self.micro_batches)

    def _losses(self, student: Any, passes: Any, losses: Any) -> Any:
        """Add the gradients of the step; the losses float64 `[2]`."""
        import torch

        from pipeline.optim.batching import parts
        from pipeline.train.losses import Batch, add_gradients

        own = self.query - self.shared - 1
        queries = [[1] * self.shared + [2 + row] + [5] * own for row in range(self.rows)]
        responses = [[7] * self.response for _ in range(self.rows)]
        micro_batches = parts(range(self.rows), self._rows_each)
        for batch in micro_batches if self.queries_apart else [range(self.rows)]:
            rows = slice(batch[0], batch[-1] + 1)
            targets = torch.zeros(len(batch), student.width)
            sizes = [len(batch)] if self.queries_apart else [len(part) for part in micro_batches]
            whole = Batch(queries[rows], responses[rows], targets)
            losses += add_gradients(student, passes, whole, sizes, "mean", align=0.1, recon=0.1)
        return losses

    def _numbers(self, config: Any, meter: Meter) -> dict[str, Any]:
        from pipeline.backbone.sizes import sizes_from_config
        from pipeline.optim.flops import step_flops
        from pipeline.optim.memory import LoraSizes, PassTokens, StepSettings, step_memory

        sizes = sizes_from_config(config.to_dict())
        if sizes is None:
            raise SystemExit(f"the plan knows no sizes of a {config.model_type}")
        lengths, rows = [(self.query, self.response)] * self.rows, self._rows_each
        tokens = PassTokens(rows, rows * self.query, rows * self.response)
        settings = StepSettings(
            checkpoint_responses=self.checkpoint_responses,
            recompute_gates=0.0 if self.checkpoint_responses else self._pass_params.recompute_gates,
            recompute_attention=self.attention == "segments",
            fused_kernels=True,
            lora=LoraSizes(self.lora) if self.lora else None,
        )
        flops = step_flops(sizes, lengths, compression_tokens=COMPRESSION_TOKENS)
        print(f"launches by phase: {dict(Counter(kernel.phase for kernel in meter.kernels))}")
        print(f"most frequent: {Counter(kernel.name for kernel in meter.kernels).most_common(12)}")
        return {
            **meter.summary(),
            "estimate_gb": round(step_memory(sizes, tokens, settings).total / 1e9, 2),
            "mfu_ceiling_h100": round(flops / meter.seconds(**H100) / H100["flops"], 3),
        }
