"""LLM2Vec (BehnamGhader et al. 2024): a language model with bidirectional attention and trained adapters.

The adapters of masked next-token prediction (MNTP) and unsupervised SimCSE are merged in this order, attention is in
both directions. It is the teacher of LLM2Vec-Gen, with the backbone as its base. As in the released checkpoints:

- The bare text, stripped, with the tokenizer's own special tokens (BOS for Llama, none for Qwen). The `llm2vec` library
  wraps the texts of a few bases that are in no preset; `template` does it for those.
- The mean is over the text's tokens, without the BOS, as in the library. The reference implementation of LLM2Vec-Gen
  averages the BOS in as well when it makes targets: `mean-all`. Qwen has no BOS, so the two are the same there.
- The tokenizer of the first adapter that ships one, else the base's: MNTP made `_` its mask token, a token of its own
  there and not in the base's tokenizer.
"""

import logging
from collections.abc import Sequence
from typing import Any

from pipeline.backbone.device import best_device
from pipeline.backbone.loading import BackboneParams, DType, identify, load_backbone, load_tokenizer
from pipeline.backbone.prompting import SLOT
from pipeline.core.errors import BackboneError, TeacherError, nested_in
from pipeline.embed.teachers.adapters import TOKENIZER, AdapterParams, fetch_adapter, merge_adapter
from pipeline.embed.teachers.bidirectional import check_bidirectional, make_bidirectional
from pipeline.embed.teachers.pooling import PooledTeacher, check_positions
from pipeline.embed.teachers.template import Pooling, TemplateTokenizer

log = logging.getLogger(__name__)

VERSION = 1


def load_llm2vec(
    backbone: BackboneParams,
    adapters: Sequence[AdapterParams],
    *,
    max_tokens: int,
    dtype: DType,
    batch_tokens: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: str = SLOT,
    pooling: Pooling = "mean",
) -> PooledTeacher:
    """Load the base model onto the best device and merge the adapters into it.

    Args:
        backbone: the base model where `name` is None.
        adapters: in the order in which they are merged.
        name: another base model, a hub name or a local folder, with its `revision` and `trust_remote_code`.

    Raises:
        BackboneError: the backbone cannot be loaded as the base model.
        TeacherError: another base model or an adapter cannot be loaded or does not fit, the model stays causal, padding
            changes its rows, `max_tokens` exceeds its positions, or the template leaves no room for a text.
    """
    own = {"name": name, "revision": revision, "trust_remote_code": trust_remote_code} if name else {}
    base = backbone.model_copy(update={"dtype": dtype, **own})
    device = best_device()
    log.info("teacher %s: device %s (the best present), %s", base.name, device, base.dtype)
    folders = []
    for index, adapter in enumerate(adapters):
        with nested_in(f"adapters.{index}"):
            folders.append(fetch_adapter(adapter.name, adapter.revision))
    shipped = next((folder for folder in folders if (folder / TOKENIZER).is_file()), None)
    log.info("teacher %s: tokenizer of %s", base.name, f"the adapter {shipped}" if shipped else "the base model")
    try:
        identity: dict[str, Any] = {**identify(base.name, base.revision)}
        tokenizer = load_tokenizer(BackboneParams(name=str(shipped)) if shipped else base)
        body = load_backbone(base, device).get_decoder()
    except BackboneError as error:
        if name:
            raise TeacherError(error.message, argument="name") from None
        raise
    check_positions(body.config, max_tokens)
    for index, (adapter, folder) in enumerate(zip(adapters, folders, strict=True)):
        with nested_in(f"adapters.{index}"):
            body = merge_adapter(body, folder, adapter.name)
    make_bidirectional(body)
    check_bidirectional(body, base.name)
    templated = TemplateTokenizer(tokenizer, max_tokens=max_tokens, template=template, pooling=pooling, strip=True)
    identity |= {
        "adapters": [identify(adapter.name, adapter.revision) for adapter in adapters],
        "kind": "llm2vec",
        "version": VERSION,
        **templated.identity,
        "dtype": dtype,
    }
    return PooledTeacher(body, templated, batch_tokens=batch_tokens, identity=identity)
