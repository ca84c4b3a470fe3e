"""Long runs: ``python -m tests.integration.protocol.fuzz --seeds 1-5 --turns 3000 [--off NAME]``."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from longshift.embedded import Guardian, LocalPostgres
from tests.integration.protocol.fuzz.ablations import ABLATIONS, WEATHERS
from tests.integration.protocol.fuzz.world import Plan, World
from tests.support.databases import Databases


@contextmanager
def databases() -> Iterator[Databases]:
    """A PostgreSQL of this run's own."""
    with tempfile.TemporaryDirectory(prefix="longshift-fuzz-") as folder, Guardian() as guardian:
        local = LocalPostgres(Path(folder), guardian=guardian)
        local.start()
        try:
            made = Databases(local.url)
            made.make_template()
            yield made
        finally:
            local.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.integration.protocol.fuzz", description=__doc__)
    parser.add_argument("--seeds", default="1-3", help="FIRST-LAST")
    parser.add_argument("--turns", type=int, help="per seed")
    parser.add_argument("--weather", choices=sorted(WEATHERS), default="fair", help="how hard the faults fall")
    parser.add_argument("--limit", type=float, default=600, help="seconds per seed")
    parser.add_argument("--off", choices=sorted(ABLATIONS), help="take one fix away: the run must then fail")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    broken = 0
    with databases() as made:
        for seed in range(int(first), int(last or first) + 1):
            weather = ABLATIONS[arguments.off].plan if arguments.off else WEATHERS[arguments.weather]
            plan = replace(weather, turns=arguments.turns or weather.turns, seed=seed, limit=arguments.limit)
            with made.fresh() as database_url:
                broken += report(database_url, plan, off=arguments.off)
    return 1 if broken else 0


def report(url: str, plan: Plan, *, off: str | None) -> int:
    async def run() -> World:
        world = World(url, plan)
        await world.run()
        return world

    began = time.monotonic()
    if off is None:
        world = asyncio.run(run())
    else:
        with ABLATIONS[off].applied():
            world = asyncio.run(run())
    witness = world.witness
    print(f"seed {plan.seed}: {len(witness.accepted)} turns, {len(witness.acknowledged)} acknowledged events,", end=" ")
    print(f"{time.monotonic() - began:.0f} s, violations: {dict(witness.violations) or 'none'}")
    print("  faults:", dict(sorted(world.chaos.stats.items())))
    for promise, example in witness.examples.items():
        print(f"  e.g. {promise}: {example}")
    sys.stdout.flush()
    return len(witness.violations)


if __name__ == "__main__":
    sys.exit(main())
