"""The generation engines; `registry` names them."""
