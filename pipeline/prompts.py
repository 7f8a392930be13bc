"""How an instruction and a text become one input."""


def join_instruction(instruction: str, text: str) -> str:
    """`instruction`, a space and `text`; the text alone where the instruction is empty."""
    return f"{instruction} {text}" if instruction else text
