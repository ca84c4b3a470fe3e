"""The randomized protocol test, and that it can fail. Long runs: ``python -m tests.integration.protocol.fuzz --help``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.integration.protocol.fuzz.ablations import ABLATIONS
from tests.integration.protocol.fuzz.world import Plan, World
from tests.support.databases import Databases

SEEDS = range(1, 7)
SLOW = {"early-answer", "ends-in-snapshot", "mail-not-compared", "plain-append"}
"""Noticed only after many turns; the model (tests/model) has variants like these."""


@pytest.mark.timeout(240)  # longer than the plan's own limit, on a machine that does much else
async def test_no_promise_is_broken_by_lost_late_and_doubled_messages_pauses_and_crashes(database_url: str) -> None:
    witness = await World(database_url, Plan()).run()

    assert not witness.violations, witness.examples
    assert len(witness.accepted) == Plan().turns


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in SLOW else name for name in sorted(ABLATIONS)]
)
async def test_with_one_fix_taken_away_the_checker_speaks(databases: Databases, name: str) -> None:
    ablation = ABLATIONS[name]
    for seed in SEEDS:
        with databases.fresh() as url, ablation.applied():
            witness = await World(url, replace(ablation.plan, seed=seed)).run()
        if ablation.breaks & witness.violations.keys():
            return
    pytest.fail(f"{ablation.what}: not noticed in {len(SEEDS) * ablation.plan.turns} turns")
