"""Dialects: the wire formats that a log can be projected into. A package each: `fold` is pure, `routes` is HTTP."""
