"""Passages: text that an agent has made findable in its session, ranked by Postgres full text."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database
from longshift.events import storable

ADD = text("""
INSERT INTO passages (tenant_id, session_id, source, ordinal, text)
SELECT :tenant, :session, :source, p.ordinal - 1, p.text
  FROM unnest(CAST(:passages AS text[])) WITH ORDINALITY AS p(text, ordinal)
ON CONFLICT DO NOTHING""")

# any of the query's words counts; ts_rank_cd prefers those that stand close together, 1 divides by the log of the length
FIND = text("""
WITH q AS (SELECT CAST(replace(CAST(plainto_tsquery('english', :query) AS text), ' & ', ' | ') AS tsquery) AS words)
SELECT p.source, p.ordinal, p.text, ts_rank_cd(p.words, q.words, 1) AS score
  FROM passages p, q
 WHERE p.session_id = :session AND p.tenant_id = :tenant AND p.words @@ q.words
   AND (CAST(:sources AS text[]) IS NULL OR p.source = ANY(CAST(:sources AS text[])))
 ORDER BY score DESC, p.source, p.ordinal LIMIT :limit""")


async def add(db: Database, passages: Sequence[str], *, tenant_id: UUID, session_id: UUID, source: str) -> int:
    """Store the passages of ``source``, numbered from 0; storing them again changes nothing."""
    params = {"tenant": tenant_id, "session": session_id, "source": source, "passages": [storable(p) for p in passages]}
    await db.execute(ADD, params)
    return len(passages)


async def find(
    db: Database, query: str, *, tenant_id: UUID, session_id: UUID, sources: Sequence[str] | None, limit: int
) -> Sequence[Row[tuple[str, int, str, float]]]:
    """(source, ordinal, text, score), best first; ties in the order of the sources."""
    params = {
        "tenant": tenant_id,
        "session": session_id,
        "query": storable(query),
        "sources": list(sources) if sources is not None else None,
        "limit": limit,
    }
    return await db.fetch(FIND, params)
