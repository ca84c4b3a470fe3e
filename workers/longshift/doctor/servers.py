"""Checks of the settings and of the three servers behind them."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from longshift import config as settings
from longshift.db import doctor, health
from longshift.db import migrations as scripts
from longshift.db.revision import ours
from longshift.doctor.findings import Check, Seen, fine, problem, warning
from longshift.doctor.ground import Ground
from longshift.errors import ArtifactCorrupt, NotFound
from longshift.model import new_id
from longshift.telemetry import masked

OLDEST_POSTGRES, OLDEST_REDIS = 15, (6, 2)
CROWDED = 0.8
LONG = timedelta(minutes=15)
CLOCK_OFF, CLOCK_WRONG = timedelta(seconds=2), timedelta(seconds=30)
_HARMLESS = ("noeviction", "volatile-lru", "volatile-lfu", "volatile-ttl", "volatile-random")


async def _settings(ground: Ground) -> Seen:
    unknown = settings.unknown()
    if unknown:
        return warning("these are no settings, and are ignored: " + ", ".join(unknown))
    return fine("each variable LONGSHIFT_... is a setting")


async def _postgres(ground: Ground) -> Seen:
    server = await ground.server()
    said = f"PostgreSQL {server.version_name}"
    if server.version < OLDEST_POSTGRES * 10_000:
        return problem(f"{said} is too old: {OLDEST_POSTGRES} or newer is needed")
    if server.read_only:
        return problem(f"{said} answers, and cannot be written to: it is a standby, or read-only")
    return fine(said)


async def _schema(ground: Ground) -> Seen:
    standing = await health.standing(ground.db)
    if standing.complaint is not None:
        return problem(standing.complaint)
    coming = scripts.Scripts().after(standing.revision)
    if coming:
        return warning(f"at revision {standing.revision}; {coming[0].revision}, which contracts, is to come")
    newer = f", newer than this software, which knows {ours().newest}" if standing.revision != ours().newest else ""
    return fine(f"at revision {standing.revision}{newer}")


async def _privileges(ground: Ground) -> Seen:
    denied = await doctor.denied(ground.db)
    return problem(f"this role may not use {', '.join(denied)}") if denied else fine("all tables can be written to")


async def _pooler(ground: Ground) -> Seen:
    if await doctor.pooled(ground.db):
        return problem(
            "a pooler in transaction mode is in front of Postgres: a worker's heartbeat cannot hold its locks"
        )
    if (await ground.server()).lock_timeout != "2s":
        return problem(
            "the options of connections do not arrive: a pooler ignores them, and nothing limits a wait for a lock"
        )
    return fine("connections lead to Postgres itself")


async def _durability(ground: Ground) -> Seen:
    server = await ground.server()
    off = [
        name for name, is_on in (("fsync", server.fsync), ("full_page_writes", server.full_page_writes)) if not is_on
    ]
    if server.synchronous_commit == "off":
        off.append("synchronous_commit")
    if off:
        return problem(f"{', '.join(off)} off: a crash of Postgres loses turns that were answered with 202")
    return fine(f"synchronous_commit is {server.synchronous_commit}")


async def _connections(ground: Ground) -> Seen:
    server = await ground.server()
    said = f"{server.connections} of {server.room} connections are in use"
    return warning(said) if server.connections > CROWDED * server.room else fine(said)


async def _transactions(ground: Ground) -> Seen:
    long = await doctor.transactions(ground.db, older_than=LONG)
    if long:
        said = ", ".join(f"{who} for {age.total_seconds() / 60:.0f} minutes" for who, age in long)
        return warning(f"transactions are open: {said}")
    return fine("no transaction is older than 15 minutes")


async def _vacuum(ground: Ground) -> Seen:
    return fine("autovacuum is on") if (await ground.server()).autovacuum else problem("autovacuum is off")


async def _vectors(ground: Ground) -> Seen:
    there = (await ground.server()).vectors
    if ground.config.embedder is None or there:
        return fine("pgvector is there" if there else "not used: recall searches words")
    return warning("LONGSHIFT_EMBEDDER is set and Postgres has no pgvector: recall searches words only")


async def _clock(ground: Ground) -> Seen:
    begun = ground.clock.now()
    there = (await doctor.server(ground.db)).now
    ended = ground.clock.now()
    off = max(begun - there, there - ended, timedelta(0))
    said = f"this machine's clock and that of Postgres differ by {off.total_seconds():.1f} s"
    if off > CLOCK_WRONG:
        return problem(said)
    return warning(said) if off > CLOCK_OFF else fine(said)


async def _redis(ground: Ground) -> Seen:
    facts = await ground.hot.facts()
    said = f"{facts.kind} {facts.version}"
    if not facts.writes:
        return problem(f"{said} answers, and refuses to be written to: it is a replica, or full, or this user may not")
    if facts.cluster:
        return problem(f"{said} is a cluster, which carries no wake-ups of ours: the keys of one list lie on one node")
    if facts.version_pair < OLDEST_REDIS:
        return warning(f"{said} is older than anything that we test with, {'.'.join(map(str, OLDEST_REDIS))}")
    return fine(said)


async def _eviction(ground: Ground) -> Seen:
    facts = await ground.hot.facts()
    if facts.policy and facts.policy not in _HARMLESS:
        return problem(f"maxmemory-policy is {facts.policy}: Redis throws away wake-ups when it is full")
    if facts.limit and facts.used > CROWDED * facts.limit:
        return warning(f"{facts.used / facts.limit:.0%} of maxmemory are in use, with the policy {facts.policy}")
    return fine(f"maxmemory-policy is {facts.policy or 'not told'}")


async def _artifacts(ground: Ground) -> Seen:
    store, key, data = ground.store, f"doctor/{new_id().hex}", b"longshift doctor was here"
    where = masked(ground.config.require("artifacts_url"))
    await store.put(key, data, size=len(data), content_type="text/plain")
    try:
        if await store.get(key) != data:
            return problem(f"{where} gives back other bytes than it was given")
    except (NotFound, ArtifactCorrupt) as error:
        return problem(f"{where} does not give back what it was given: {error}")
    finally:
        await store.delete(key)
    return fine(f"{where} can be written to, read and deleted from")


async def _shared_store(ground: Ground) -> Seen:
    hosts = {worker.host for worker in await ground.workers() if worker.alive}
    if ground.config.require("artifacts_url").startswith("file:") and len(hosts) > 1:
        return warning(f"artifacts are in a folder, and workers are on {len(hosts)} machines")
    return fine("every worker can read what another one has stored")


CHECKS: Final = (
    Check(
        "settings",
        _settings,
        "Correct their names, or unset them.",
    ),
    Check(
        "postgres",
        _postgres,
        "See whether the server runs and LONGSHIFT_DATABASE_URL leads to its primary, with the right user and password.",
    ),
    Check(
        "redis",
        _redis,
        "See whether the server runs and LONGSHIFT_REDIS_URL leads to its primary. Without it work is accepted and does not "
        "start.",
    ),
    Check(
        "artifacts",
        _artifacts,
        "See whether LONGSHIFT_ARTIFACTS_URL leads to a bucket or folder, and the credentials allow to put, get and delete.",
    ),
    Check(
        "schema",
        _schema,
        "`longshift migrate` brings the database to what this version needs; `longshift migrate --contract` takes away what "
        "only older software used.",
        ("postgres",),
    ),
    Check(
        "privileges",
        _privileges,
        "GRANT SELECT, INSERT, UPDATE, DELETE on the tables and USAGE on the sequences to this role, or let it own them.",
        ("postgres", "schema"),
    ),
    Check(
        "pooler",
        _pooler,
        "Give the direct address of Postgres as LONGSHIFT_DATABASE_URL, or use the pooler in session mode: each process has "
        "a pool of its own (LONGSHIFT_POOL_SIZE).",
        ("postgres",),
    ),
    Check("durability", _durability, "Turn them on: Longshift commits in groups, and needs them.", ("postgres",)),
    Check(
        "connections",
        _connections,
        "Raise max_connections, or lower LONGSHIFT_POOL_SIZE: a worker needs that many and one, an API process that many.",
        ("postgres",),
    ),
    Check(
        "transactions",
        _transactions,
        "End them (pg_terminate_backend): while they last nothing that was deleted is cleaned up, and migrations wait.",
        ("postgres",),
    ),
    Check("vacuum", _vacuum, "Turn it on: rows of sessions change several times for each turn.", ("postgres",)),
    Check(
        "vectors", _vectors, "Install pgvector and run `longshift migrate`, or unset LONGSHIFT_EMBEDDER.", ("postgres",)
    ),
    Check(
        "clock",
        _clock,
        "Let NTP set the clocks: `run_after` and deadlines are checked by the clock of the API's machine.",
        ("postgres",),
    ),
    Check(
        "eviction",
        _eviction,
        "Set maxmemory-policy to noeviction or volatile-lru, and maxmemory to what the hot contexts need.",
        ("redis",),
    ),
    Check(
        "shared store",
        _shared_store,
        "Use a bucket (s3://...), or see to it that the folder is the same on all machines.",
        ("postgres", "schema", "artifacts"),
    ),
)
