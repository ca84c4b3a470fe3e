"""Recall: the passages that answer a query, by full text and, where there are vectors, by meaning.

Full text always works. Vectors come on top of it where pgvector is there and an embedder is configured; passages get theirs
when they are indexed, or, if the embedder was away then, with a later recall of their session. Whatever is wrong with vectors
leaves full text, and fails no turn.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID

from longshift.clock import SYSTEM, Clock
from longshift.contract import Passage
from longshift.db import passages, vectors
from longshift.db.database import Database, chunks
from longshift.db.passages import Reach
from longshift.embedding import BATCH, Embedding, EmbeddingFailed
from longshift.errors import InvalidInput, Unavailable
from longshift.model import Claim, Prefix, show_id

logger = logging.getLogger(__name__)

K = 60
"""Constant of the fusion by rank: how little the first places count for more than the next ones."""
DEPTH = 4
"""So many times more passages than wanted are taken from each ranking: one that is low in both may win."""
PATIENCE = 30.0
"""Seconds of embedding that an indexing waits for; later recalls do the rest."""
AGAIN = 300.0
"""Seconds from one look whether there are vectors to the next."""

Place = tuple[UUID, str, int]


class Retrieval:
    """Passages and their vectors, for one process."""

    def __init__(self, db: Database, embedding: Embedding | None = None, *, clock: Clock = SYSTEM) -> None:
        self._db, self._embedding, self._clock = db, embedding, clock
        self._has_vectors = False
        self._look_at = 0.0  # by the monotonic clock

    async def prepare(self) -> None:
        """Look whether there are vectors here, and make their table if need be; if not, later calls look again.

        Raises:
            Unavailable: Postgres does not answer.
        """
        if self._embedding is not None:
            self._look_at = self._clock.monotonic() + AGAIN
            self._has_vectors = await vectors.prepare(self._db)

    async def _vectors_here(self) -> bool:
        """Whether there are: many workers that start together wait for each other, and some give up before their turn."""
        if not self._has_vectors and self._clock.monotonic() >= self._look_at:
            with suppress(Unavailable):
                await self.prepare()
        return self._has_vectors

    async def index(self, claim: Claim, texts: Sequence[str], *, source: str, ordinals: Sequence[int]) -> bool:
        """Keep passages of a session; storing them again changes nothing. False: the lease is gone.

        Raises:
            Unavailable: Postgres does not answer.
        """
        if not await passages.add(self._db, claim, texts, source=source, ordinals=ordinals):
            return False
        if self._embedding is not None and await self._vectors_here():
            places = [(claim.session_id, source, ordinal) for ordinal in ordinals]
            until = self._clock.monotonic() + PATIENCE
            for chunk in chunks(zip(places, texts, strict=True), size=BATCH):
                if self._clock.monotonic() > until or not await self._embed(self._embedding, chunk):
                    break
        return True

    async def _embed(self, embedding: Embedding, chunk: Sequence[tuple[Place, str]]) -> bool:
        try:
            found = await embedding.embed([text for _, text in chunk])
            assert embedding.name is not None
            await vectors.add(self._db, [place for place, _ in chunk], found, embedder=embedding.name)
        except (EmbeddingFailed, Unavailable, InvalidInput):
            return False
        return True

    async def recall(self, query: str, *, reach: Reach, session_id: UUID, limit: int) -> list[Passage]:
        """The best ``limit`` passages within ``reach``, for a turn of ``session_id``.

        Raises:
            Unavailable: Postgres does not answer.
        """
        if limit <= 0:
            return []
        words = await passages.find(self._db, query, reach=reach, limit=limit * DEPTH)
        meant = await self._nearest(query, reach=reach, session_id=session_id, limit=limit * DEPTH)
        if meant is None:
            return [_shown(row, row.score) for row in words[:limit]]
        rows = {_place(row): row for row in (*words, *meant)}
        fused = fuse([[_place(row) for row in words], [_place(row) for row in meant]])
        return [_shown(rows[place], score) for place, score in fused[:limit]]

    async def _nearest(self, query: str, *, reach: Reach, session_id: UUID, limit: int) -> Sequence[Any] | None:
        """None: there are no vectors, now or at all."""
        if self._embedding is None or not query.strip() or not await self._vectors_here():
            return None
        try:
            vector = await self._embedded(self._embedding, query, session_id=session_id)
            assert self._embedding.name is not None
            return await vectors.nearest(self._db, vector, reach=reach, embedder=self._embedding.name, limit=limit)
        except (EmbeddingFailed, InvalidInput):
            return None
        except Unavailable as error:  # full text has just answered: it is the vectors' fault
            logger.warning("recall goes without vectors", extra={"reason": str(error)})
            return None

    async def _embedded(self, embedding: Embedding, query: str, *, session_id: UUID) -> list[float]:
        """The query's vector; in the same call, those that passages of its session still lack, as many as fit."""
        if embedding.name is None:  # the first call: nobody knows yet which vectors are missing
            return (await embedding.embed([query]))[0]
        lacking = await vectors.missing(self._db, session_id, embedder=embedding.name, limit=BATCH - 1)
        before = embedding.name
        vector, *others = await embedding.embed([query, *(row.text for row in lacking)])
        if others and embedding.name == before:
            await vectors.add(self._db, [_place(row) for row in lacking], others, embedder=embedding.name)
        return vector


def fuse(rankings: Sequence[Sequence[Place]]) -> list[tuple[Place, float]]:
    """One ranking of several, with scores: the sum of 1 / (60 + rank) over those that have it.

    Only ranks count, so that scores of different kinds need no common scale. Cormack, Clarke and Büttcher, "Reciprocal Rank
    Fusion Outperforms Condorcet and Individual Rank Learning Methods", SIGIR 2009; 60 is theirs.
    """
    scores: dict[Place, float] = defaultdict(float)
    for ranking in rankings:
        for rank, place in enumerate(ranking, start=1):
            scores[place] += 1 / (K + rank)
    return sorted(scores.items(), key=lambda found: (-found[1], found[0]))


def _place(row: Any) -> Place:
    return row.session_id, row.source, row.ordinal


def _shown(row: Any, score: float) -> Passage:
    return Passage(
        source=row.source,
        ordinal=row.ordinal,
        text=row.text,
        score=round(score, 6),
        session_id=show_id(Prefix.SESSION, row.session_id),
    )
