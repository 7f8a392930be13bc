"""The text of a value: a text is itself, of a chat it is the first user turn.

A chat is a list of messages, or a string that holds such a list as JSON or as Python writes it. A message has `role`
and `content`, or `from` and `value`; where a table has all four, the two that are null do not count. Content is a text,
a part, or a list of these; a part that holds no text (an image) adds none.
"""

import ast
import json
import re
import warnings
from typing import Any

_USER_ROLES = ("user", "human", "prompter")
_ROLE, _CONTENT = ("role", "from"), ("content", "value")
_TEXT_OF_PART = ("text", "value", "parts")
_WRITTEN_CHAT = re.compile(r"""\s*\[\s*\{.*["'](?:role|from)["']\s*:""", re.DOTALL)


def text_of(value: Any) -> str | None:
    """The text of a value, None of a null; a chat without a user turn is an empty text.

    Raises ValueError if the value is neither a text nor a chat.
    """
    match value:
        case None:
            return None
        case str():
            messages = _written(value) if _WRITTEN_CHAT.match(value) else None
            return value if messages is None else _first_user_turn(messages)
        case [*messages]:
            return _first_user_turn(messages)
    raise ValueError(f"found {type(value).__name__} {str(value)[:40]!r}, expected a text or a list of messages")


def _written(text: str) -> list[Any] | None:
    """The messages that a string writes out; None if it is a text like any other."""
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
                messages = parse(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # TypeError: of a list as a key
            continue
        if all(isinstance(message, dict) and _has(message, _ROLE) and _has(message, _CONTENT) for message in messages):
            return messages
    return None


def _has(message: dict[str, Any], names: tuple[str, ...]) -> bool:
    return any(name in message for name in names)


def _first_user_turn(messages: list[Any]) -> str:
    return next((text for message in messages if (text := _user_text(message)) is not None), "")


def _user_text(message: Any) -> str | None:
    """The text of a message if the user wrote it."""
    if not isinstance(message, dict) or not _has(message, _ROLE):
        raise ValueError(f"a message must have 'role' and 'content', or 'from' and 'value', not {message!r:.80}")
    role = _first(message, _ROLE)
    if str(role).strip().lower() not in _USER_ROLES:
        return None
    return _content(_first(message, _CONTENT))


def _first(message: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of these values that is not null."""
    return next((message[name] for name in names if message.get(name) is not None), None)


def _content(content: Any) -> str:
    match content:
        case None:
            return ""
        case str():
            return content
        case [*parts]:
            return "\n".join(text for part in parts if (text := _content(part)))
        case dict() if _has(content, (*_TEXT_OF_PART, "type")):
            return _content(_first(content, _TEXT_OF_PART))
    raise ValueError(f"the content of a message must be a text or parts with a text, not {content!r:.80}")
