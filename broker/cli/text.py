"""Text from outside, made fit for a terminal: models, tools and servers must not be able to control it."""

from __future__ import annotations

import codecs
import io
import json
import re
from typing import Any

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROLS[0x0D] = ""
"""A carriage return alone would write over what stands in its line, and with a line feed it says nothing."""
del _CONTROLS[ord("\n")], _CONTROLS[ord("\t")]

_PLAIN = {"…": "~", "→": ">", "←": "<", "·": "-", "–": "-", "━": "#", "─": "-"}
"""What our own marks are where the terminal's encoding has not got them."""


def harmless(text: str) -> str:
    """Control characters (C0, DEL, C1) become visible, such as `\\x1b`; line feeds and tabs stay."""
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Harmless, and every stretch of white space is one blank."""
    return harmless(" ".join(text.split()))


def compact(value: Any) -> str:
    """A JSON value on one line, for people: a text without its quotes, everything else as JSON."""
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`."""
    whole = round(max(seconds, 0))
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def parameter(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON, else as the text that it is. Raises ValueError without `=`."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"{text!r} is not name=value")
    try:
        return name, json.loads(value, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return name, value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    if re.fullmatch(r"-?inf", str(float(number))):
        raise ValueError(f"{number} is too large")
    return float(number)


def _legible(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


codecs.register_error("legible", _legible)


def make_legible(stream: object) -> None:
    """What `stream` (standard output, standard error) cannot encode is written as `?` or the like, and never raises."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="legible")
