"""A step of two micro-batches of each phase of the stage `teach` on the fake GPU, with its params' defaults."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

from bench.fake_gpu import models
from bench.fake_gpu.meter import Meter
from bench.fake_gpu.simulation import simulated


def walk(config: Any, mode: Any) -> Iterator[dict[str, Any]]:
    """The numbers of the second step of masked next-token prediction and of SimCSE, beside the plan's estimate.

    For SimCSE it is an upper bound: it has attention keep its dropped weights, which the kernels compute again.
    """
    from pipeline.backbone.sizes import sizes_from_config
    from pipeline.teach.params import TeachParams
    from pipeline.teach.plan import phase_memory

    params, sizes = TeachParams(), sizes_from_config(config.to_dict())
    if sizes is None:
        raise SystemExit(f"the plan knows no sizes of a {config.model_type}")
    for name, whole in (("mntp", params.mntp), ("simcse", params.simcse)):
        phase, meter = whole.model_copy(update={"batch_size": 2 * whole.micro_batch_size}), Meter()
        _step(name, phase, models.fake_model(config, mode), mode, meter)
        yield {"way": name, **meter.summary(), "estimate_gb": round(phase_memory(params, phase, sizes).total / 1e9, 2)}


def _step(name: str, phase: Any, model: Any, mode: Any, meter: Meter) -> None:
    import torch

    from pipeline.backbone.lora import adapter_parameters, add_adapter
    from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
    from pipeline.embed.teachers.template import Tokens
    from pipeline.optim.gradients import adamw

    with simulated(mode, meter):
        for tensor in (*model.parameters(), *model.buffers()):
            meter.add(tensor)
        body = model.get_decoder()
        make_bidirectional(body)
        check_bidirectional(body, "fake")
        adapted = add_adapter(body, **phase.lora.model_dump(), seed=0)
        trained = adapter_parameters(adapted)
        rows = [Tokens([1 + row] * phase.max_tokens, [1] * phase.max_tokens) for row in range(phase.batch_size)]
        objective = _objective(name, phase, model, adapted, rows)
        optimizer = adamw(trained, rate=phase.learning_rate, weight_decay=0.0)
        for step in range(2):
            meter.reset()
            objective.gradients(range(phase.batch_size), step)
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def _objective(name: str, phase: Any, model: Any, adapted: Any, rows: Any) -> Any:
    from pipeline.backbone.output_head import logit_transform
    from pipeline.teach.dropout import SeededDropout
    from pipeline.teach.mntp import MntpObjective
    from pipeline.teach.simcse import SimcseObjective

    if name == "mntp":
        return MntpObjective(
            adapted,
            SeededDropout(adapted, 0.0),
            rows,
            head=model.get_output_embeddings(),
            transform=logit_transform(model),
            fraction=phase.mask_fraction,
            mask_id=0,
            micro_batch_size=phase.micro_batch_size,
            seed=0,
        )
    # Whether the two views of a text differ is a matter of values.
    with mock.patch.object(SimcseObjective, "__post_init__", lambda _: None):
        dropout = SeededDropout(adapted, phase.dropout)
        size = phase.micro_batch_size
        return SimcseObjective(adapted, dropout, rows, scale=phase.scale, micro_batch_size=size, seed=0)
