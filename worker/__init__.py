"""Executes runs. What an agent needs is here: `Run`, `Checkpoint` and the events; what a tool needs: `tool`."""

from broker.events import (
    Attempt,
    Cancelled,
    Data,
    Error,
    Event,
    Final,
    Message,
    Progress,
    Reasoning,
    Sources,
    Start,
    Token,
    ToolCall,
    ToolResult,
)
from worker.agent import Agent, Checkpoint, Run, Turn
from worker.tools.tool import tool

__all__ = [
    "Agent",
    "Attempt",
    "Cancelled",
    "Checkpoint",
    "Data",
    "Error",
    "Event",
    "Final",
    "Message",
    "Progress",
    "Reasoning",
    "Run",
    "Sources",
    "Start",
    "Token",
    "ToolCall",
    "ToolResult",
    "Turn",
    "tool",
]
