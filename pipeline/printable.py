"""Texts that anyone may have written, made safe to show: a terminal or a page must not obey them."""


def visible(text: str) -> str:
    """Text without control characters, which neither a page nor a terminal should be sent."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")
