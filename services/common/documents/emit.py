"""A document as YAML text that `strict.load` reads back to an equal document. For drafts; never to re-write a file.

The bytes of an existing charter, study or policy are hashed and pinned: they are copied, never emitted again.
"""

import datetime
import json
import re
from typing import Any

from services.common.documents.strict import Section


def emit(document: Section, comments: bool = False) -> bytes:
    """UTF-8 YAML, keys in the order of the model; `comments` puts each key's description beside it.

    None and empty tuples that are defaults are left out.
    Texts are quoted unless they are short plain words, so no digest becomes a number.
    """
    return ("\n".join(_section(document, 0, comments)) + "\n").encode()


def _section(section: Section, indent: int, comments: bool) -> list[str]:
    lines: list[str] = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if value is None or (value in ((), {}) and not field.is_required()):
            continue
        note = f"  # {field.description}" if comments and field.description else ""
        head = " " * indent + key + ":"
        lines += _entry(head, value, indent, comments, note)
    return lines


def _entry(head: str, value: Any, indent: int, comments: bool, note: str) -> list[str]:
    """`head` and its value, nested ones `indent` + 2 deep."""
    if isinstance(value, Section):
        return [head + note, *_section(value, indent + 2, comments)]
    if isinstance(value, dict) and value:
        pairs = [" " * (indent + 2) + f"{_scalar(k)}: {_scalar(v)}" for k, v in value.items()]
        return [head + note, *pairs]
    if isinstance(value, tuple) and value and isinstance(value[0], Section):
        lines = [head + note]
        for item in value:
            first, *rest = _section(item, indent + 4, comments)
            lines += [" " * (indent + 2) + "- " + first.lstrip(), *rest]
        return lines
    if isinstance(value, str) and "\n" in value.rstrip("\n") and _literal(value):
        return [f"{head} |{note}", *(" " * (indent + 2) + line for line in value[:-1].split("\n"))]
    return [f"{head} {_scalar(value)}{note}"]


def _literal(text: str) -> bool:
    """Whether a literal block gives back exactly this text: one newline at its end, nothing to escape."""
    ends = text.endswith("\n") and not text.endswith("\n\n")
    return ends and re.fullmatch(r"[!-~][ -~\n]*", text) is not None


def _scalar(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float | datetime.date):
        return str(value)
    text = str(value)
    if len(text) < 32 and re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*(/v1)?", text) and text not in _WORDS:
        return text
    return json.dumps(text, ensure_ascii=True)


_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
