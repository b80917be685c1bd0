"""A Redis-backed, resumable stream broker for AI agent runs."""

__version__ = "0.1.0"
