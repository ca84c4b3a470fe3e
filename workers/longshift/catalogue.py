"""What may be submitted: drafts of turns, checked against the agents that workers have registered."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from jsonschema.exceptions import SchemaError, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from longshift.db.intake import Entry
from longshift.errors import InvalidInput, LongshiftError, UnknownAgent
from longshift.events import encode
from longshift.model import AgentRecord, Json, NewTurn, new_id
from longshift.offload import size_of

MAX_ERRORS = 20
"""Misfits reported at once; the rest would help nobody."""

_LONGEST_MESSAGE = 300
_MOST_NAMES = 20
_HORIZON = timedelta(days=365_250)  # no time may be further away: what is computed from it must fit a datetime as well
_NOT_BLANK = r"\S"
_BARE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*\Z")


@dataclass(frozen=True, slots=True)
class Draft:
    """A turn as a client words it, not validated yet."""

    agent: str
    input: Json
    agent_version: str | None = None
    session_id: UUID | None = None  # None: a new session
    run_after: datetime | None = None
    deadline: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    custom_id: str | None = None
    traceparent: str | None = None
    line: int | None = None  # where it stood, for messages


@dataclass(frozen=True, slots=True)
class Misfit:
    """A line of a batch that could not even be read; ``errors`` as in ``InvalidInput``."""

    line: int
    errors: Sequence[dict[str, Json]]


class Drafts(Protocol):
    """The turns of a batch, in order. It is read twice: once to validate all of it, once to store it."""

    def __iter__(self) -> Iterator[Draft | Misfit]: ...


class Catalogue:
    """The agents registered by workers, as of one moment. ``before``: what it replaces; compiled schemas are kept."""

    def __init__(self, agents: Iterable[AgentRecord], *, before: Catalogue | None = None) -> None:
        self._versions: dict[str, dict[str, AgentRecord]] = {}
        for agent in agents:  # of one name the one for new turns comes last
            versions = self._versions.setdefault(agent.name, {})
            versions.pop(agent.version, None)
            versions[agent.version] = agent
        self.validators: dict[tuple[str, str], tuple[AgentRecord, Validator]] = before.validators if before else {}

    def find(self, name: str, version: str | None = None) -> AgentRecord:
        """The agent, in the version asked for or else the one for new turns.

        Raises:
            UnknownAgent: no worker has registered it.
        """
        versions = self._versions.get(name)
        if versions is None:
            raise UnknownAgent(
                f"no worker has registered an agent {name!r}: start a worker that has it ({self._known()})"
            )
        if version is None:
            return next(reversed(versions.values()))
        if version not in versions:
            raise UnknownAgent(f"no worker has registered version {version!r} of {name!r}, only {', '.join(versions)}")
        return versions[version]

    def _known(self) -> str:
        names = sorted(self._versions)
        if len(names) > _MOST_NAMES:
            return f"known are {', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES:,} more"
        return f"known are {', '.join(names)}" if names else "none is known yet"

    def new_turn(self, draft: Draft, *, now: datetime, check: bool = True) -> NewTurn:
        """The turn that ``draft`` asks for. ``check`` False: it has been validated before.

        Raises:
            UnknownAgent: no worker has registered it.
            InvalidInput: the input does not fit the agent's schema, or the times do not fit each other.
        """
        agent = self.find(draft.agent, draft.agent_version)
        if check:
            errors = [*check_times(draft.run_after, draft.deadline, now=now), *self._check_input(agent, draft.input)]
            if errors:
                raise InvalidInput(f"the turn does not fit agent {agent.name!r}: {_first(errors)}", errors=errors)
        return NewTurn(
            agent=agent.name,
            input=draft.input,
            queue=agent.queue,
            agent_version=draft.agent_version,
            run_after=draft.run_after,
            deadline=draft.deadline,
            metadata=draft.metadata,
            custom_id=draft.custom_id,
            traceparent=draft.traceparent,
        )

    def _check_input(self, agent: AgentRecord, value: Json) -> Iterator[dict[str, Json]]:
        try:
            errors = self._validator(agent).iter_errors(value)
            for error, _ in zip(errors, range(MAX_ERRORS), strict=False):
                yield _describe(error)
        except (SchemaError, Unresolvable) as error:
            raise InvalidInput(
                f"the input schema that a worker registered for {agent.name!r} cannot be used: {_short(str(error))}"
            ) from None
        except RecursionError:
            yield {"path": "input", "message": "nested too deeply"}

    def _validator(self, agent: AgentRecord) -> Validator:
        known = self.validators.get((agent.name, agent.version))
        if known is None or known[0] != agent:
            schema = dict(agent.input_schema)
            kind = validator_for(schema)
            kind.check_schema(schema)
            # with a registry that resolves nothing, a "$ref" cannot make this process fetch a URL
            known = (agent, kind(schema, registry=Registry()))
            self.validators[(agent.name, agent.version)] = known
        return known[1]


@dataclass(slots=True)
class Checked:
    """What the first reading of a batch found."""

    total: int = 0
    misfits: int = 0
    errors: list[dict[str, Json]] = field(default_factory=list)
    unknown: bool = False  # an agent was not in the catalogue
    sessions: set[UUID] = field(default_factory=set)
    large: list[int] = field(default_factory=list)  # places of those whose input is too large for a row

    def refuse(self, line: int, errors: Iterable[Mapping[str, Json]]) -> None:
        self.misfits += 1
        room = MAX_ERRORS - len(self.errors)
        self.errors += [{"line": line, **error} for error, _ in zip(errors, range(room), strict=False)]

    def verify(self) -> None:
        if not self.total:
            raise InvalidInput("the batch is empty: send at least one turn")
        if self.misfits:
            raise InvalidInput(
                f"{self.misfits:,} of {self.total:,} lines do not fit, so none was accepted: {_first(self.errors)}",
                errors=self.errors,
            )


def check_batch(drafts: Drafts, catalogue: Catalogue, now: datetime, *, inline: int) -> Checked:
    """``inline``: bytes of an input that stays in its row."""
    found = Checked()
    custom_ids: dict[str, int] = {}
    for number, draft in enumerate(drafts, start=1):
        found.total += 1
        line = draft.line or number
        if isinstance(draft, Misfit):
            found.refuse(line, draft.errors)
            continue
        if draft.custom_id is not None and (first := custom_ids.setdefault(draft.custom_id, line)) != line:
            message = f"{_short(repr(draft.custom_id))} is the custom_id of line {first} too"
            found.refuse(line, [{"path": "custom_id", "message": message}])
            continue
        if draft.session_id is not None:
            found.sessions.add(draft.session_id)
        try:
            catalogue.new_turn(draft, now=now)
            if size_of(encode(draft.input)) > inline:
                found.large.append(found.total - 1)
        except UnknownAgent as error:
            found.unknown = True
            found.refuse(line, [{"path": "agent", "message": str(error)}])
        except InvalidInput as error:
            found.refuse(line, error.errors or [{"path": "", "message": str(error)}])
    return found


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """A large input: its artifact, and the artifacts that it names."""

    artifact: UUID
    named: frozenset[UUID]

    def of(self, turn: NewTurn) -> NewTurn:
        """The turn with this in the place of its input."""
        return replace(turn, input=None, input_artifact=self.artifact, named=self.named)


NOTHING: Mapping[int, Elsewhere] = {}


def inputs(drafts: Drafts, places: Collection[int]) -> Generator[tuple[int, str], None, None]:
    """The inputs at these places, as JSON text."""
    for place, draft in enumerate(drafts):
        if place in places and isinstance(draft, Draft):
            yield place, encode(draft.input)


def entries(
    drafts: Drafts, catalogue: Catalogue, now: datetime, *, laid_out: Mapping[int, Elsewhere] = NOTHING
) -> Iterator[Entry]:
    """``laid_out``: by their place, the artifacts of inputs that are too large for a row."""
    for place, draft in enumerate(drafts):
        if isinstance(draft, Misfit):
            raise LongshiftError("a batch changed between its two readings")
        turn = catalogue.new_turn(draft, now=now, check=False)
        if place in laid_out:
            turn = laid_out[place].of(turn)
        yield Entry(turn, draft.session_id or new_id())


def check_times(run_after: datetime | None, deadline: datetime | None, *, now: datetime) -> Iterator[dict[str, Json]]:
    """Where the times of a turn do not fit, as ``{"path", "message"}``."""
    far = False
    for name, value in (("run_after", run_after), ("deadline", deadline)):
        if value is not None and abs(value - now) > _HORIZON:
            far = True
            yield {"path": name, "message": "is more than 1,000 years away"}
    if far:
        return
    if deadline is not None and deadline <= max(now, run_after or now):
        message = "is in the past" if deadline <= now else "is not after run_after"
        yield {"path": "deadline", "message": message}


def _describe(error: ValidationError) -> dict[str, Json]:
    error = _nearest(error)
    path = "input" + "".join(
        f".{part}" if isinstance(part, str) and _BARE_NAME.match(part) else f"[{part!r}]"
        for part in error.absolute_path
    )
    blank = error.validator == "pattern" and error.validator_value == _NOT_BLANK
    return {"path": path, "message": "is blank" if blank else _short(error.message)}


def _nearest(error: ValidationError) -> ValidationError:
    """Of a value that fits no branch of a union, what is wrong with the branch that it was meant for: the one whose
    errors lie inside the value rather than at the value itself. The error as it is, where that does not tell.
    """
    branches: dict[object, list[ValidationError]] = {}
    for each in error.context or ():
        branches.setdefault(each.relative_schema_path[0], []).append(each)
    inside = [errors for errors in branches.values() if all(each.relative_path for each in errors)]
    return _nearest(inside[0][0]) if len(inside) == 1 else error


def _short(text: str) -> str:
    """The message without the middle: jsonschema quotes the whole value, and says what is wrong with it at the end."""
    half = _LONGEST_MESSAGE // 2
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def _first(errors: Sequence[Mapping[str, Json]]) -> str:
    error = errors[0]
    place = f"line {error['line']}: " if "line" in error else ""
    return f"{place}{error['path']}: {error['message']}" if error["path"] else f"{place}{error['message']}"
