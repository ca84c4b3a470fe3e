"""Longshift: long-running agent jobs on a fleet of workers that share nothing.

What an agent's author needs is here; everything else has a module of its own::

    from longshift import Turn, agent, step


    @step
    async def read(url: str) -> str: ...


    @agent("summary", version="1")
    async def summary(turn: Turn, url: str) -> str:
        return (await read(url))[:100]
"""

from longshift.agent import Agent, agent, step
from longshift.contract import Artifact, Passage, Verdict
from longshift.errors import (
    ArtifactCorrupt,
    ChildFailed,
    Conflict,
    InvalidInput,
    LongshiftError,
    NotDone,
    NotFound,
    OutcomeUnknown,
    StepFailed,
    StepTimeout,
    ToolDenied,
    Unavailable,
    UsageError,
    WaitTimeout,
)
from longshift.steps import Retry
from longshift.summaries import Budget
from longshift.tools import Absent, Approval, Done, Tool, ToolCall, Unknown, tool
from longshift.turn import Child, State, Turn, cancelled, emit

__all__ = [
    "Absent",
    "Agent",
    "Approval",
    "Artifact",
    "ArtifactCorrupt",
    "Budget",
    "Child",
    "ChildFailed",
    "Conflict",
    "Done",
    "InvalidInput",
    "LongshiftError",
    "NotDone",
    "NotFound",
    "OutcomeUnknown",
    "Passage",
    "Retry",
    "State",
    "StepFailed",
    "StepTimeout",
    "Tool",
    "ToolCall",
    "ToolDenied",
    "Turn",
    "Unavailable",
    "Unknown",
    "UsageError",
    "Verdict",
    "WaitTimeout",
    "agent",
    "cancelled",
    "emit",
    "step",
    "tool",
]
