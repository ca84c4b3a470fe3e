"""The ledger of ``longshift.testing`` is a dict: it must do what Postgres does, whatever it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from uuid import UUID

import pytest

from longshift.db import tool_calls, upkeep
from longshift.db.tool_calls import Ending, Start
from longshift.errors import Conflict, NotFound
from longshift.events import encode
from longshift.model import (
    CallOutcome,
    CallStatus,
    Claim,
    Dedupe,
    Effect,
    Json,
    NewCall,
    Settlement,
    ToolCallRecord,
    new_id,
)
from longshift.testing import Ledger
from tests.integration.protocol.stage import Stage

STEPS = 60
CALLS = [(effect, number) for effect in (Effect.WRITE, Effect.IRREVERSIBLE) for number in range(2)]
OUTCOMES = [CallStatus.DONE, CallStatus.FAILED, CallStatus.UNKNOWN]


@dataclass
class Twins:
    """Both ledgers, one session, and everybody who has ever held its lease."""

    stage: Stage
    random: Random
    holders: list[Claim]
    turn: UUID
    twin: Ledger = field(default_factory=Ledger)
    ids: dict[tuple[Effect, int], UUID] = field(default_factory=lambda: {call: new_id() for call in CALLS})

    def call(self) -> NewCall:
        effect, number = self.random.choice(CALLS)
        key = self.ids[effect, number]
        return NewCall(key, self.turn, "pay", effect, Dedupe.TURN, f"pay#{number}", "{}", timedelta(minutes=1))

    def somebody(self) -> Claim:
        """Mostly the holder."""
        return self.random.choice([*self.holders, *self.holders[-1:] * 3])

    async def begin(self) -> None:
        claim, call = self.somebody(), self.call()
        over = self.random.choice([None, self.somebody().epoch])
        found = (await tool_calls.begin(self.stage.db, [Start(claim, call, over)]))[call.id, claim.epoch]
        assert found.held == (claim is self.holders[-1])
        if found.held:
            mine = self.twin.begin(call, epoch=claim.epoch, over=over, **self._facts(claim))
            assert (mine if isinstance(mine, int) else 0) == found.attempts

    async def end(self) -> None:
        claim, call, status = self.somebody(), self.call(), self.random.choice(OUTCOMES)
        text = encode(f"by {claim.epoch}")
        outcome = CallOutcome(status, text if status is CallStatus.DONE else None, error=text)
        epoch = self.random.choice([None, self.somebody().epoch])
        theirs = (await tool_calls.end(self.stage.db, [Ending(claim, call, outcome, epoch)])).get(call.id)
        mine = self.twin.end(call, outcome, epoch=claim.epoch if epoch is None else epoch, **self._facts(claim))
        assert (mine and mine.status) == (theirs and theirs.status)

    async def settle(self) -> None:
        key, outcome = self.call().id, self.random.choice(list(Settlement))
        mine = theirs = "settled"
        try:
            self.twin.settle(key, outcome, result=1, now=datetime.now(UTC))
        except (Conflict, NotFound) as error:
            mine = type(error).__name__
        try:
            db, tenant = self.stage.db, self.stage.tenant
            await tool_calls.settle(db, key, tenant_id=tenant, outcome=outcome, result=1, by=new_id())
        except (Conflict, NotFound) as error:
            theirs = type(error).__name__
        assert mine == theirs

    async def take_over(self) -> None:
        await self.stage.kill(self.holders[-1].worker_id)
        await upkeep.rescue(self.stage.db)
        self.holders.append((await self.stage.claim(self.holders[0].session_id)).claim)

    async def compare(self) -> None:
        theirs = await tool_calls.standing(self.stage.db, list(self.ids.values()))
        assert {row.id: shown(row) for row in self.twin} == {key: shown(row) for key, row in theirs.items()}

    def _facts(self, claim: Claim) -> Json:
        return {"session_id": claim.session_id, "tenant_id": claim.tenant_id, "now": datetime.now(UTC)}


def shown(row: ToolCallRecord) -> Json:
    ended, settled = row.ended_at is None, row.settled_at is None
    return row.status, row.attempts, row.epoch, row.place, row.result, row.error, ended, settled


@pytest.mark.parametrize("seed", range(8))
async def test_the_ledger_of_the_testing_kit_is_a_twin_of_the_one_in_postgres(stage: Stage, seed: int) -> None:
    claim, turn = await stage.running()
    twins = Twins(stage, Random(seed), [claim], turn)
    moves = [twins.begin, twins.end, twins.begin, twins.end, twins.settle, twins.take_over]
    for _ in range(STEPS):
        await twins.random.choice(moves)()
        await twins.compare()
