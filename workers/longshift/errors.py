"""Every error Longshift raises, as one tree.

    LongshiftError                     what a caller may catch
     +- ConfigError                    a setting is missing or wrong: the message names it
     +- UsageError                     the authoring interface was called wrongly (by an agent's author)
     +- InvalidInput                   what was submitted does not fit: ``errors`` says where
     +- NotFound                       no such session, turn, batch, artifact or agent (for this tenant)
     |   +- UnknownAgent
     +- Conflict                       the request contradicts what is stored
     |   +- IdempotencyMismatch        same key, other body
     |   +- SessionBusy                ``on_busy=reject`` and a turn is open
     |   +- InUse                      the session has an open turn, or was used in this very moment; retryable
     |   +- AlreadyAnswered            somebody else has decided, or nobody waits for the answer any more
     +- Denied                         the API key is missing, wrong, or lacks a scope
     +- Unavailable                    Postgres, Redis or the object store did not answer; retryable
     |   +- StoreUnavailable           it was the object store, and something that Postgres points to is needed from there
     +- StepFailed                     a step failed for good; the same on the first run and on every replay
     |   +- StepTimeout
     |   +- OutcomeUnknown             an irreversible tool may have been called, or not
     |   +- ToolDenied                 somebody was asked whether the tool may be called, and said no
     +- NotDone                        raised by an irreversible tool that has certainly done nothing
     +- WaitTimeout                    what a turn waited for did not come in time
     +- ChildFailed                    a child turn ended without a result
     +- ArtifactCorrupt                the stored bytes do not have the promised hash
    ControlFlow (BaseException)        never caught by ``except Exception`` of a framework
     +- LeaseLost                      another worker may hold the session now: everything on the old turn raises this
     +- TurnEvicted                    the turn leaves this worker (wait, drain); its coroutine is being unwound
     +- TurnCancelled                  somebody asked for the turn to end
     +- GivenUp                        the turn cannot go on: it fails, whatever the agent makes of this
         +- Diverged                   the code now calls a tool with other input than when the turn ran before
         +- ValueLost                  a large value that the log points to is gone from the artifact store

The docstring of each class is the sentence that documents it. ``retryable`` says whether the same call may succeed later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class LongshiftError(Exception):
    """Base of every error that a caller may want to catch."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False


class ConfigError(LongshiftError):
    """A setting is missing or wrong; the message names the setting and a valid value."""

    code = "config"


class UsageError(LongshiftError):
    """The authoring interface was called in a way that cannot be made durable; the message says what to write instead."""

    code = "usage"


class InvalidInput(LongshiftError):
    """What was submitted does not fit; ``errors`` lists each place as ``{"path", "message"}``."""

    code = "invalid_input"

    def __init__(self, message: str, *, errors: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.errors = list(errors)


class NotFound(LongshiftError):
    """There is no such thing, or it belongs to another tenant: the two are not told apart."""

    code = "not_found"


class UnknownAgent(NotFound):
    """No worker has registered an agent of this name (and version)."""

    code = "unknown_agent"


class Conflict(LongshiftError):
    """The request contradicts what is already stored."""

    code = "conflict"


class IdempotencyMismatch(Conflict):
    """The idempotency key was used before with another body."""

    code = "idempotency_mismatch"


class SessionBusy(Conflict):
    """The session has an open turn and the request said ``on_busy=reject``."""

    code = "session_busy"
    retryable = True


class InUse(Conflict):
    """What was asked for needs an idle session, and it has an open turn or is used in this very moment."""

    code = "in_use"
    retryable = True


class AlreadyAnswered(Conflict):
    """An approval has its answer, or its turn no longer waits for one: of two answers the first counts."""

    code = "already_answered"


class Denied(LongshiftError):
    """The API key is missing, wrong, expired or revoked, or it lacks the scope that the request needs."""

    code = "unauthorized"


class Unavailable(LongshiftError):
    """A dependency did not answer in time; nothing was lost, the same call may succeed later."""

    code = "unavailable"
    retryable = True


class StoreUnavailable(Unavailable):
    """The object store did not answer, and what is needed is nowhere else; Postgres is well."""

    code = "unavailable"


class StepFailed(LongshiftError):
    """A step failed after its last attempt.

    Recorded in the log, and so raised alike on the first run and on every replay: ``error_type`` is the class name of
    what the step raised, ``error_message`` its text.
    """

    code = "step_failed"

    def __init__(self, step: str, *, error_type: str, error_message: str) -> None:
        super().__init__(f"step {step!r} failed: {error_type}: {error_message}")
        self.step = step
        self.error_type = error_type
        self.error_message = error_message


class StepTimeout(StepFailed):
    """A step did not finish within its timeout."""

    code = "step_timeout"


class OutcomeUnknown(StepFailed):
    """An irreversible tool was called, and nobody can say whether that had its effect: it is not called again.

    ``call`` is its key, under which an operator can settle it (``longshift settle``).
    """

    code = "outcome_unknown"

    def __init__(self, step: str, *, error_type: str, error_message: str, call: str = "") -> None:
        super().__init__(step, error_type=error_type, error_message=error_message)
        self.call = call


class ToolDenied(StepFailed):
    """The call of a tool needs an approval, and it was denied or did not come in time."""

    code = "tool_denied"


class NotDone(LongshiftError):
    """For an irreversible tool to raise: what it should do has certainly not happened, so that it may be called again."""

    code = "not_done"


class WaitTimeout(LongshiftError):
    """What a turn waited for did not come in time."""

    code = "wait_timeout"


class ChildFailed(LongshiftError):
    """A child turn ended without a result: ``turn_id``, its ``status``, and its ``error`` as clients see it."""

    code = "child_failed"

    def __init__(self, turn_id: str, *, status: str, error: Mapping[str, Any] | None) -> None:
        reason = (error or {}).get("message", "")
        super().__init__(f"child {turn_id} has {status}" + (f": {reason}" if reason else ""))
        self.turn_id = turn_id
        self.status = status
        self.error = error


class ArtifactCorrupt(LongshiftError):
    """The bytes in the object store do not have the hash that the log promised."""

    code = "artifact_corrupt"


class ControlFlow(BaseException):
    """Not an error of the agent: the turn must unwind. Outside ``Exception`` because frameworks catch that."""


class LeaseLost(ControlFlow):
    """The write was refused because this worker no longer holds the session's lease."""


class TurnEvicted(ControlFlow):
    """The turn leaves this worker: every branch waits, or the worker drains."""


class GivenUp(ControlFlow):
    """The turn cannot go on from here, and fails with the ``code`` of this; ``details`` join its error."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details


class Diverged(GivenUp):
    """A tool that has been called at this place of the turn is now called with other input: the code between the steps has
    changed, and to call it once more, or to take the old result for the new call, would both be guesses.

    The turn fails; ``retry`` goes on from there once the code makes the same call again.
    """

    code = "diverged"

    def __init__(self, step: str, *, place: str) -> None:
        super().__init__(
            f"tool step {step!r} was called with other arguments before, at the same place of this turn ({place}): bring the "
            "code between its steps back to what it was, and retry the turn",
            step=step,
        )


class ValueLost(GivenUp):
    """A large value that the log points to is not in the artifact store any more, or is not what was stored there.

    The turn fails; ``retry`` goes on from there once the store has it again.
    """

    code = "value_lost"

    def __init__(self, artifact: str, *, reason: str) -> None:
        super().__init__(
            f"a large value of this turn is lost: {artifact}: {reason}. Restore it from a backup of the artifact store, and "
            "retry the turn",
            artifact=artifact,
        )


class TurnCancelled(ControlFlow):
    """Somebody asked for this turn to end, or its deadline passed."""

    def __init__(self, reason: str = "cancelled") -> None:
        super().__init__(reason)
        self.reason = reason
