"""Passages: text that is findable in its session and its tenant, ranked by Postgres full text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Row, text

from longshift.db.database import Database, chunks
from longshift.events import storable
from longshift.model import Claim

AT_ONCE = 200
"""Passages of one statement, during which the session's row is locked."""

# fenced like every write of a holder: after a session's deletion nobody may add to it
ADD = text("""
WITH s AS MATERIALIZED (
    SELECT id, tenant_id FROM sessions
     WHERE id = :session AND lease_epoch = :epoch AND lease_worker = :worker FOR NO KEY UPDATE),
i AS (
    INSERT INTO passages (tenant_id, session_id, source, ordinal, text)
    SELECT s.tenant_id, s.id, :source, p.ordinal, p.text
      FROM s, unnest(CAST(:ordinals AS integer[]), CAST(:passages AS text[])) AS p(ordinal, text)
    ON CONFLICT DO NOTHING)
SELECT EXISTS (SELECT 1 FROM s) AS held""")

# Any of the query's words counts; ts_rank_cd prefers those that stand close together, 1 divides by the log of the length.
# Ranking reads each passage that it compares, and a common word is in most of them: so each word brings 1,000 candidates at
# most, and all words together as many. Of a rare word that is every passage.
MOST = 1000
WORDS = 16
_FIND = """
WITH q AS (
    SELECT plainto_tsquery('english', :query) AS together,
           CAST(replace(CAST(plainto_tsquery('english', :query) AS text), ' & ', ' | ') AS tsquery) AS any_of),
w AS (
    SELECT together AS wanted FROM q UNION
    SELECT * FROM (
        SELECT CAST('''' || replace(replace(word, '\\', '\\\\'), '''', '''''') || '''' AS tsquery)
          FROM unnest(tsvector_to_array(to_tsvector('english', :query))) AS word
         ORDER BY length(word) DESC, word LIMIT {words}) longest),
c AS MATERIALIZED (
    SELECT DISTINCT f.session_id, f.source, f.ordinal FROM w CROSS JOIN LATERAL (
        SELECT p.session_id, p.source, p.ordinal FROM passages p
         WHERE p.words @@ w.wanted AND p.tenant_id = :tenant AND {where}
           AND (CAST(:sources AS text[]) IS NULL OR p.source = ANY(CAST(:sources AS text[])))
         LIMIT {most}) f)
SELECT p.session_id, p.source, p.ordinal, p.text, ts_rank_cd(p.words, q.any_of, 1) AS score
  FROM c JOIN passages p USING (session_id, source, ordinal) CROSS JOIN q
 ORDER BY score DESC, p.session_id, p.source, p.ordinal LIMIT :limit"""
IN_SESSION = "p.session_id = :session"
# of a session whose deletion was interrupted there may be passages left
IN_TENANT = "p.session_id IN (SELECT d.id FROM sessions d WHERE d.tenant_id = :tenant AND d.deleted_at IS NULL)"
FIND_IN_SESSION = text(_FIND.format(where=IN_SESSION, words=WORDS, most=MOST))
FIND_IN_TENANT = text(_FIND.format(where=IN_TENANT, words=WORDS, most=MOST))


@dataclass(frozen=True, slots=True)
class Reach:
    """Where to search: in one session, or (None) in all of a tenant; in some sources, or (None) in all."""

    tenant_id: UUID
    session_id: UUID | None
    sources: Sequence[str] | None = None

    @property
    def params(self) -> dict[str, Any]:
        params: dict[str, Any] = {
            "tenant": self.tenant_id,
            "sources": [storable(source) for source in self.sources] if self.sources is not None else None,
        }
        return params if self.session_id is None else params | {"session": self.session_id}


async def add(db: Database, claim: Claim, passages: Sequence[str], *, source: str, ordinals: Sequence[int]) -> bool:
    """Store passages of ``source``; storing them again changes nothing. False: the lease is gone."""
    for chunk in chunks(zip(ordinals, passages, strict=True), size=AT_ONCE):
        params = {
            "session": claim.session_id,
            "epoch": claim.epoch,
            "worker": claim.worker_id,
            "source": storable(source),
            "ordinals": [ordinal for ordinal, _ in chunk],
            "passages": [storable(passage) for _, passage in chunk],
        }
        if not (await db.fetch(ADD, params))[0].held:
            return False
    return True


async def find(db: Database, query: str, *, reach: Reach, limit: int) -> Sequence[Row[Any]]:
    """(session_id, source, ordinal, text, score), best first; ties in a fixed order."""
    statement = FIND_IN_TENANT if reach.session_id is None else FIND_IN_SESSION
    return await db.fetch(statement, {**reach.params, "query": storable(query), "limit": limit})
