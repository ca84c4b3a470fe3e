"""Vectors of passages, where the extension pgvector can be had; everything works without.

The table is made outside of the migrations, so that none of them needs the extension. One column of the type ``vector`` holds
vectors of all lengths, told apart by their embedder, as pgvector's documentation has it; the search is exact. An index is for
whoever has hundreds of thousands of passages in one tenant (docs/how-to/memory.md). Vectors go with their passages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Row, TextClause, text
from sqlalchemy.exc import DBAPIError

from longshift.db.database import Database, reason
from longshift.db.passages import IN_SESSION, IN_TENANT, Reach
from longshift.errors import Unavailable

logger = logging.getLogger(__name__)

LOCK = 0x6C73_7665_6374
"""Workers that start together make the table one after another."""
IS_THERE = text("SELECT to_regclass('passage_vectors') IS NOT NULL AS made")
CAN_BE_HAD = text("SELECT EXISTS (SELECT 1 FROM pg_available_extensions WHERE name = :name) AS available")
MAKE = (
    text("""
CREATE TABLE IF NOT EXISTS passage_vectors (
    session_id uuid NOT NULL,
    source text NOT NULL,
    ordinal integer NOT NULL,
    embedder text NOT NULL,
    tenant_id uuid NOT NULL,
    embedding vector NOT NULL,
    PRIMARY KEY (session_id, source, ordinal, embedder),
    FOREIGN KEY (session_id, source, ordinal) REFERENCES passages ON DELETE CASCADE)"""),
    text("COMMENT ON COLUMN passage_vectors.embedder IS 'module:function/length: vectors of one name can be compared'"),
    text("CREATE INDEX IF NOT EXISTS ix_passage_vectors_tenant ON passage_vectors (tenant_id, embedder)"),
)

# a passage that is deleted meanwhile takes its vector along: locked, it stays until the vector is there
ADD = text("""
WITH p AS MATERIALIZED (
    SELECT p.tenant_id, p.session_id, p.source, p.ordinal, v.embedding
      FROM unnest(CAST(:sessions AS uuid[]), CAST(:sources AS text[]), CAST(:ordinals AS integer[]),
                  CAST(:vectors AS text[])) AS v(session_id, source, ordinal, embedding)
      JOIN passages p USING (session_id, source, ordinal)
     ORDER BY p.session_id, p.source, p.ordinal FOR KEY SHARE OF p)
INSERT INTO passage_vectors (session_id, source, ordinal, embedder, tenant_id, embedding)
SELECT session_id, source, ordinal, :embedder, tenant_id, CAST(embedding AS vector) FROM p
ON CONFLICT DO NOTHING""")

MISSING = text("""
SELECT p.session_id, p.source, p.ordinal, p.text FROM passages p
 WHERE p.session_id = :session AND NOT EXISTS (
    SELECT 1 FROM passage_vectors v
     WHERE (v.session_id, v.source, v.ordinal, v.embedder) = (p.session_id, p.source, p.ordinal, :embedder))
 ORDER BY p.source, p.ordinal LIMIT :limit""")

# the length is part of the statement, and nothing but the distance of the inner order: so an index on the expression serves it
_NEAREST = """
SELECT n.session_id, n.source, n.ordinal, t.text, n.distance FROM (
    SELECT p.session_id, p.source, p.ordinal,
           CAST(p.embedding AS vector({length})) <=> CAST(:query AS vector({length})) AS distance
      FROM passage_vectors p
     WHERE {where} AND p.tenant_id = :tenant AND p.embedder = :embedder
       AND (CAST(:sources AS text[]) IS NULL OR p.source = ANY(CAST(:sources AS text[])))
     ORDER BY CAST(p.embedding AS vector({length})) <=> CAST(:query AS vector({length})) LIMIT :limit) n
  JOIN passages t USING (session_id, source, ordinal)
 ORDER BY n.distance, n.session_id, n.source, n.ordinal"""


def nearest_statement(reach: Reach, *, length: int) -> TextClause:
    where = IN_TENANT if reach.session_id is None else IN_SESSION
    return text(_NEAREST.format(where=where, length=int(length)))


async def prepare(db: Database, *, extension: str = "vector") -> bool:
    """Make the table, unless it is there; False, and a line in the log: there are no vectors here.

    Raises:
        Unavailable: Postgres does not answer.
    """
    try:
        async with db.transaction() as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
            if (await connection.execute(IS_THERE)).scalar_one():
                return True
            if not (await connection.execute(CAN_BE_HAD, {"name": extension})).scalar_one():
                logger.info("no vectors: this Postgres has no extension pgvector; recall uses full text")
                return False
            await connection.execute(text(f'CREATE EXTENSION IF NOT EXISTS "{extension}"'))
            for statement in MAKE:
                await connection.execute(statement)
            return True
    except DBAPIError as error:
        logger.warning(
            "no vectors: the extension pgvector or its table cannot be made; recall uses full text. Let somebody with the "
            "rights run `longshift migrate`",
            extra={"reason": reason(error)},
        )
        return False


async def add(
    db: Database, passages: Sequence[tuple[UUID, str, int]], vectors: Sequence[Sequence[float]], *, embedder: str
) -> None:
    """Store the vectors of passages that are still there, unless theirs are there."""
    params = {
        "sessions": [session for session, _, _ in passages],
        "sources": [source for _, source, _ in passages],
        "ordinals": [ordinal for _, _, ordinal in passages],
        "vectors": [_written(vector) for vector in vectors],
        "embedder": embedder,
    }
    with _Vectors():
        await db.execute(ADD, params)


async def missing(db: Database, session_id: UUID, *, embedder: str, limit: int) -> Sequence[Row[Any]]:
    """(session_id, source, ordinal, text) of passages that have no vector of this embedder."""
    with _Vectors():
        return await db.fetch(MISSING, {"session": session_id, "embedder": embedder, "limit": limit})


async def nearest(
    db: Database, query: Sequence[float], *, reach: Reach, embedder: str, limit: int
) -> Sequence[Row[Any]]:
    """(session_id, source, ordinal, text, distance), nearest first, by the cosine of the angle."""
    statement = nearest_statement(reach, length=len(query))
    params = {**reach.params, "query": _written(query), "embedder": embedder, "limit": limit}
    with _Vectors():
        return await db.fetch(statement, params)


class _Vectors:
    """Around what needs the table: whatever is wrong with it or the extension is ``Unavailable``."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DBAPIError):
            raise Unavailable(f"Postgres has no vectors: {reason(error)}") from error


def _written(vector: Sequence[float]) -> str:
    return f"[{','.join(map(repr, vector))}]"
