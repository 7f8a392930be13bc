"""A model once more: modules and config of its own over the very tensors of the first."""

import copy
import itertools
from typing import Any


def twin(model: Any) -> Any:
    """A copy of the modules that shares every parameter and buffer, and what bitsandbytes keeps beside them."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    beside = (getattr(module, name, None) for module in model.modules() for name in ("state", "quant_state"))
    return copy.deepcopy(model, {id(kept): kept for kept in itertools.chain(tensors, beside) if kept is not None})
