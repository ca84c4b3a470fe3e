"""Statements per second that idle workers send to Postgres, and commands to Redis. Default settings.

Every statement of an idle worker is a transaction of its own, so the transactions of the database are counted, from
another database. One worker of a fleet is the sweeper's leader and costs more than the others: two sizes tell both.
"""

from __future__ import annotations

import asyncio
from statistics import median

import redis

from tests.benchmarks.figures import Report
from tests.benchmarks.stack import Site, Stack, query

FLEET = 50
TRANSACTIONS = (
    "SELECT xact_commit + xact_rollback AS n, clock_timestamp() AS at FROM pg_stat_database WHERE datname = %s"
)


async def run(stack: Stack, *, short: bool) -> Report:
    repetitions, seconds, sizes = (1, 2.0, (1, 3)) if short else (5, 20.0, (1, 5))
    report = Report("idle", f"idle workers, counted over {seconds:g} s")
    statements: dict[int, list[float]] = {}
    commands: dict[int, list[float]] = {}
    async with stack.site() as site:
        for size in sizes:
            await site.start(size - len(site.workers))
            await asyncio.sleep(1 if short else 12)  # what the start cost has reached the statistics
            for _ in range(repetitions):
                sql, calls = await count(site, seconds)
                statements.setdefault(size, []).append(sql)
                commands.setdefault(size, []).append(calls)
    for size in sizes:
        report.add(f"{size} idle: Postgres", "statements/s", statements[size])
        report.add(f"{size} idle: Redis", "commands/s", commands[size])
    one, many = (median(statements[size]) for size in sizes)
    follower = (many - one) / (sizes[1] - sizes[0])
    report.notes.append(
        f"Each further worker costs {follower:.2f} statements/s, so that {FLEET} would cost "
        f"{one + follower * (FLEET - 1):.0f} (computed, not measured)."
    )
    return report


async def count(site: Site, seconds: float) -> tuple[float, float]:
    """Statements and commands per second."""
    database = site.database_url.partition("?")[0].rpartition("/")[2]
    with redis.Redis.from_url(site.redis_url) as client:
        before = query(site.stack.server_url, TRANSACTIONS, database)[0]
        commands = client.info("stats")["total_commands_processed"]
        await asyncio.sleep(seconds)
        after = query(site.stack.server_url, TRANSACTIONS, database)[0]
        commands = client.info("stats")["total_commands_processed"] - commands - 1
    passed = (after.at - before.at).total_seconds()
    return (after.n - before.n) / passed, commands / passed
