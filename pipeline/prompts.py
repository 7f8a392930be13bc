"""How an instruction and a text become one input."""

from typing import Literal

# Which side of a comparison a text is on; both sides of a symmetric one are queries.
Side = Literal["query", "document"]


def join_instruction(instruction: str, text: str) -> str:
    """`instruction`, a space and `text`; the text alone where the instruction is empty."""
    return f"{instruction} {text}" if instruction else text
