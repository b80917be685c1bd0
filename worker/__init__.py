"""Executes runs. What an agent needs is here: `Run`, `Checkpoint` and the events that it may yield."""

from broker.events import Data, Event, Final, Message, Progress, Reasoning, Sources, Token, ToolCall, ToolResult
from worker.agent import Agent, Checkpoint, Run

__all__ = [
    "Agent",
    "Checkpoint",
    "Data",
    "Event",
    "Final",
    "Message",
    "Progress",
    "Reasoning",
    "Run",
    "Sources",
    "Token",
    "ToolCall",
    "ToolResult",
]
