"""Summaries: older messages leave the context for one that stands for them. In the log they stay.

    the turn begins -> is the context over its budget? -> step $summarize -> context.summarized -> the agent's first line
                                                          |  1. the messages that leave become passages, for turn.recall
                                                          |  2. the summarizer gives a text
    turn.summarize() --------------------------------> the same, in the branch that calls it

The step is recorded after the passages are there, and the event after the step: wherever a worker dies between them,
nothing that leaves the context is lost. The event says how many of the oldest messages it replaces. Whatever joins the
context meanwhile stands behind those, so that it does not matter which of the two comes first; only another summary can come
between. So the step records the *fingerprint* of what it has summarized, and a summary of what is not there any more is
dropped for a new one.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, cast

from pydantic import BaseModel

from longshift import extractive
from longshift.errors import UsageError
from longshift.events import Kind, storable
from longshift.execution import Execution
from longshift.model import Json
from longshift.pieces import pieces
from longshift.place import running_step
from longshift.steps import Retry, StepDefinition
from longshift.tokens import FRAME, Gauge, TokenCounter, shown

logger = logging.getLogger(__name__)

Summarizer = Callable[[Sequence[Mapping[str, Json]], int], Awaitable[str] | str]
"""Messages as in ``turn.history``, oldest first, and how many tokens the text may have."""

HISTORY = "history"
"""Source of the passages that were messages."""
STRIDE = 1024
"""Ordinals of the pieces of one message: they begin at that many times its number in the session."""
LEAST = 400
"""Tokens of the smallest budget."""
SHORTEST = 50
"""Tokens of a summary of the smallest budget; those of larger ones get a sixteenth."""
TRIES = 2
"""Of a summarizer, before the built-in one takes its place."""
START = "$start"
"""The branch in which a turn summarizes before its agent begins."""
STEP, EVENT = "$summarize", "$summarized"


@dataclass(frozen=True, slots=True)
class Budget:
    """How large a session's context may become.

    A turn that begins with less than an eighth of its budget left has its oldest messages summarized first: so the context
    is within the budget when the agent begins, and still when it ends if the turn adds no more than that eighth.

    Attributes:
        tokens: of all messages of the history together; the state does not count.
        summarize: a function of the messages that leave and of the tokens that its text may have, async or plain; one that
            fails twice, or gives more than twice as much, is replaced by the built-in one for this time. None: that one,
            which needs no model: it keeps how each message begins.
        counter: counts tokens; a string names a vocabulary of ``tiktoken`` (the extra ``tiktoken``), which may be fetched
            from the network when it is first used. None: a token for each four characters.
        keep: tokens of the newest messages that stay as they are, if they are no more than that; default: half.
        timeout: of one try of ``summarize``.
    """

    tokens: int
    summarize: Summarizer | None = None
    counter: TokenCounter | str | None = None
    keep: int | None = None
    timeout: timedelta = timedelta(minutes=2)
    gauge: Gauge = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokens < LEAST:
            raise UsageError(f"Budget(tokens={self.tokens}): nothing fits into less than {LEAST}")
        if not 0 < self.kept <= self.tokens * 5 // 8:
            raise UsageError(
                f"Budget(keep={self.keep}): between 1 and five eighths of {self.tokens} can stay; the rest is for the "
                "summary and for what turns add"
            )
        object.__setattr__(self, "gauge", Gauge(self.counter))

    @property
    def kept(self) -> int:
        return self.tokens // 2 if self.keep is None else self.keep

    @property
    def target(self) -> int:
        """Tokens of a summary."""
        return max(SHORTEST, self.tokens // 16)

    @property
    def full(self) -> int:
        """Tokens from which on messages leave."""
        return self.tokens - self.tokens // 8


USUAL = Budget(8_000)
"""Of an agent that names none, for ``turn.summarize()``."""


class Summary(BaseModel, frozen=True):
    """What the step records.

    Attributes:
        replaces: messages at the beginning of the context for which it stands.
        fingerprint: of those.
        of: messages of the session for which it stands, those of an earlier summary included.
        before, after: tokens of the context.
        content: its text; None: what the built-in summarizer makes of those messages, which needs no record.
    """

    replaces: int
    fingerprint: str
    of: int
    before: int
    after: int
    content: str | None = None


class Summaries:
    """The summaries of one attempt at a turn."""

    def __init__(self, execution: Execution, budget: Budget | None) -> None:
        self._execution = execution
        self._budget = budget
        self._one_by_one = asyncio.Lock()

    async def begin(self) -> None:
        """Before the agent's first line: bring the context below its budget.

        Whether to is decided once: when the agent has begun, later attempts only do again what the log has of it, whatever
        the code says of the budget by then.
        """
        execution, budget = self._execution, self._budget
        replay = execution.replay
        scope = execution.root.fork_named(START)
        if budget is None and not replay.upcoming(scope, STEP):
            return
        with execution.standing_in(scope):
            while replay.upcoming(scope, STEP) or (
                budget is not None and not replay.has_begun(START) and await self._is_full(budget)
            ):
                if not await self._summarize():
                    return

    async def now(self) -> bool:
        """On demand, whether the budget is used up or not; False: there was nothing to summarize."""
        if running_step() is not None:
            raise UsageError("a step cannot use summarize(): call it in the agent, between steps")
        return await self._summarize()

    async def _is_full(self, budget: Budget) -> bool:
        messages = self._execution.whole_context().messages
        if budget.gauge.surely_within(messages, budget.full):
            return False
        counts = await budget.gauge.count(messages)
        return sum(counts) > budget.full and _leaving(messages, counts, budget.kept) > 0

    async def _summarize(self) -> bool:
        execution = self._execution
        step = StepDefinition(STEP, self._made, Retry(attempts=5), timedelta(days=365), ours=True)
        async with self._one_by_one:  # two branches at once would summarize the same
            while True:
                summary = cast(Summary | None, await execution.perform(step, (), {}))
                if summary is None:
                    return False
                payload = await self._payload(summary)
                if payload is not None:
                    await execution.add(EVENT, Kind.CONTEXT_SUMMARIZED, payload)
                    return True

    async def _payload(self, summary: Summary) -> Mapping[str, Json] | None:
        """What the event says; None: there is none, and will be none, since what it stands for was not there any more."""
        recorded = self._execution.replay.upcoming(self._execution.scope(), EVENT)
        if recorded is not None:
            return recorded.payload if recorded.payload.get("fingerprint") == summary.fingerprint else None
        budget = self._budget or USUAL
        await budget.gauge.count(())  # what was counted before may have been in another process
        messages = self._execution.whole_context().messages[: summary.replaces]
        if fingerprint(messages) != summary.fingerprint:
            return None
        text = summary.content or _extract(budget, [json.loads(message) for message in messages], summary.of)
        return {
            "replaces": summary.replaces,
            "role": "system",
            "content": text,
            "summary_of": summary.of,
            "fingerprint": summary.fingerprint,
            "tokens": {"before": summary.before, "after": summary.after},
        }

    # -- the step

    async def _made(self) -> Summary | None:
        """A summary of the messages that leave; None: none would."""
        budget = self._budget or USUAL
        messages = list(self._execution.whole_context().messages)
        counts = await budget.gauge.count(messages)
        number = _leaving(messages, counts, budget.kept)
        if number == 0:
            return None
        leaving = [json.loads(message) for message in messages[:number]]
        first = _stands_for(leaving[0])
        of = first + number - (first > 0)
        await self._index(leaving, messages, first)
        text = await self._text(budget, leaving)
        shortened = text if text is not None else _extract(budget, leaving, of)
        return Summary(
            content=text,
            replaces=number,
            fingerprint=fingerprint(messages[:number]),
            of=of,
            before=sum(counts),
            after=sum(counts[number:]) + budget.gauge.of(shortened) + FRAME,
        )

    async def _index(self, leaving: Sequence[Mapping[str, Json]], texts: Sequence[str], first: int) -> None:
        """Let ``recall`` find what leaves. A message has the same number in its session whenever that is done again."""
        ordinals: list[int] = []
        passages: list[str] = []
        start = 1 if first else 0  # an earlier summary: what it stands for was indexed with it
        for number, message in enumerate(leaving[start:], start=first):
            text = f"{message['role']}: {shown(texts[number - first + start])}"
            found = pieces(storable(text))
            ordinals.extend(range(number * STRIDE, number * STRIDE + len(found)))
            passages.extend(found)
        await self._execution.port.index(HISTORY, passages, ordinals=ordinals)

    async def _text(self, budget: Budget, leaving: Sequence[Mapping[str, Json]]) -> str | None:
        """What the author's summarizer gives; None: there is none, or it fails."""
        for attempt in range(TRIES):
            if budget.summarize is None:
                break
            try:
                return self._checked(budget, await self._asked(budget, leaving))
            except Exception as error:  # noqa: BLE001 - whatever it is, the built-in one takes its place
                logger.warning(
                    "a summarizer failed",
                    extra={
                        "turn_id": self._execution.record.id.hex,
                        "attempt": attempt + 1,
                        "reason": f"{type(error).__name__}: {error}",
                    },
                )
        return None

    async def _asked(self, budget: Budget, leaving: Sequence[Mapping[str, Json]]) -> object:
        function = cast(Callable[..., Any], budget.summarize)
        async with asyncio.timeout(budget.timeout.total_seconds()):
            if inspect.iscoroutinefunction(function):
                return await function(leaving, budget.target)
            value = await self._execution.port.in_thread(partial(function, leaving, budget.target))
            return await value if inspect.isawaitable(value) else value

    def _checked(self, budget: Budget, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"it returned {type(value).__name__} where the text of a summary was wanted")
        if (size := budget.gauge.of(value)) > 2 * budget.target:
            raise UsageError(f"its text has {size:,} tokens, more than twice the {budget.target:,} that it was given")
        return storable(value)


def _leaving(messages: Sequence[str], counts: Sequence[int], keep: int) -> int:
    """How many of the oldest messages leave if the newest ``keep`` tokens stay, and in any case the newest message."""
    number, left = len(messages) - 1, sum(counts[-1:])
    while number > 0 and left + counts[number - 1] <= keep:
        number -= 1
        left += counts[number]
    return 0 if number <= 1 and _is_summary(messages) else max(0, number)


def _is_summary(messages: Sequence[str]) -> bool:
    return bool(messages) and _stands_for(json.loads(messages[0])) > 0


def _stands_for(message: Mapping[str, Json]) -> int:
    """Messages for which an earlier summary stands; 0: it is none."""
    return int(message.get("summary_of", 0))


def _extract(budget: Budget, leaving: Sequence[Mapping[str, Json]], of: int) -> str:
    return storable(extractive.summarize(leaving, tokens=budget.target, count=budget.gauge.of, of=of))


def fingerprint(messages: Sequence[str]) -> str:
    """16 hex digits of the messages' text."""
    return hashlib.sha256("\n".join(messages).encode("utf-8", "surrogatepass")).hexdigest()[:16]
