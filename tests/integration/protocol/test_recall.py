"""Recall against a real Postgres: by words, by meaning, both fused; never across tenants, never of what is deleted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from threading import Event as Gate
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import event, text

from longshift.clock import Clock
from longshift.contract import Passage
from longshift.db import vectors
from longshift.db.database import Database
from longshift.db.passages import Reach
from longshift.embedding import BATCH, LEFT_ALONE, Embedding, load_embedder
from longshift.errors import ConfigError, Unavailable
from longshift.model import Claim, Prefix, new_id, show_id
from longshift.retrieval import AGAIN, Retrieval, fuse
from tests.integration.protocol.stage import Stage
from tests.support.meaning import embed


class Embedder:
    """``embed`` of ``tests.support.meaning``, counted, and told to fail."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.error: Exception | None = None
        self.answer: Callable[[list[str]], object] = embed

    async def embed(self, texts: list[str]) -> list[list[float]]:
        self.calls.append(texts)
        if self.error is not None:
            raise self.error
        return self.answer(texts)  # type: ignore[return-value]


class Ticking:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    @property
    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.seconds)


@pytest.fixture
def ticking() -> Ticking:
    return Ticking()


@pytest.fixture
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture
async def retrieval(stage: Stage, embedder: Embedder, ticking: Ticking) -> Retrieval:
    made = Retrieval(stage.db, Embedding("tests:meaning", embedder.embed, clock=ticking.clock), clock=ticking.clock)
    await made.prepare()
    return made


async def held(stage: Stage, *, tenant: UUID | None = None) -> Claim:
    stage.tenant = tenant or stage.tenant
    return (await stage.claim((await stage.submit())[0])).claim


async def index(retrieval: Retrieval, claim: Claim, *texts: str, source: str = "notes") -> None:
    assert await retrieval.index(claim, texts, source=source, ordinals=range(len(texts)))


async def recall(
    retrieval: Retrieval,
    claim: Claim,
    query: str,
    *,
    tenant: bool = False,
    sources: Sequence[str] | None = None,
    limit: int = 8,
) -> list[Passage]:
    reach = Reach(claim.tenant_id, None if tenant else claim.session_id, sources)
    return await retrieval.recall(query, reach=reach, session_id=claim.session_id, limit=limit)


def texts(found: Sequence[Passage]) -> list[str]:
    return [passage.text for passage in found]


async def has_vectors(stage: Stage) -> int:
    return int((await stage.one("SELECT count(*) AS n FROM passage_vectors"))["n"])


# -- words


async def test_without_an_embedder_words_are_ranked(stage: Stage) -> None:
    words, claim = Retrieval(stage.db), await held(stage)
    await words.prepare()
    await index(
        words, claim, "The ship is late.", "Ships and a ship in the harbour: the ship of ships.", "Nothing here."
    )
    found = await recall(words, claim, "Which ships?")
    assert [passage.ordinal for passage in found] == [1, 0]
    assert found[0].score > found[1].score > 0
    assert {passage.session_id for passage in found} == {show_id(Prefix.SESSION, claim.session_id)}
    assert await recall(words, claim, "a boat") == []
    assert await recall(words, claim, "ship", limit=0) == []


async def test_indexing_again_changes_nothing_and_storable_text_is_kept(stage: Stage) -> None:
    words, claim = Retrieval(stage.db), await held(stage)
    for _ in range(2):
        await index(words, claim, "a ship \0 and \ud800", "second", source="s\0")
    row = await stage.one("SELECT count(*) AS n, min(text) AS text, min(source) AS source FROM passages")
    assert (row["n"], row["text"], row["source"]) == (2, "a ship \u2400 and \ufffd", "s\u2400")
    assert len(await recall(words, claim, "ship \0 \ud800", sources=["s\0"])) == 1


async def test_who_has_lost_the_lease_indexes_nothing(stage: Stage) -> None:
    words, claim = Retrieval(stage.db), await held(stage)
    await stage.hand.execute("UPDATE sessions SET lease_worker = NULL, lease_epoch = nextval('epochs')")
    assert not await words.index(claim, ["too late"], source="notes", ordinals=[0])
    assert (await stage.one("SELECT count(*) AS n FROM passages"))["n"] == 0


# -- how far it reaches


async def test_a_tenant_recalls_from_all_of_its_sessions_and_from_no_others(stage: Stage, retrieval: Retrieval) -> None:
    """Words and vectors alike, whatever the limit, the source, and whoever has the better passage."""
    ours, theirs = new_id(), new_id()
    first, second = await held(stage, tenant=ours), await held(stage, tenant=ours)
    other = await held(stage, tenant=theirs)
    for claim, name in ((first, "first"), (second, "second"), (other, "other")):
        best = "ship ship ship boat" if claim is other else "a ship"
        await index(retrieval, claim, f"{best} {name}", f"the crop {name}")
    for query in ("ship", "vessel", "crop harvest", "first second other"):
        for sources in (None, ["notes"]):
            for limit in (1, 2, 100):
                for claim, expected in ((first, {first, second}), (second, {first, second}), (other, {other})):
                    ids = {show_id(Prefix.SESSION, each.session_id) for each in expected}
                    found = await recall(retrieval, claim, query, tenant=True, sources=sources, limit=limit)
                    assert found
                    assert {passage.session_id for passage in found} <= ids
                    if limit == 100:
                        assert {passage.session_id for passage in found} == ids
                    own = await recall(retrieval, claim, query, sources=sources, limit=limit)
                    assert {passage.session_id for passage in own} == {show_id(Prefix.SESSION, claim.session_id)}


async def test_another_tenants_session_is_not_searched_even_if_it_is_named(stage: Stage, retrieval: Retrieval) -> None:
    ours, other = await held(stage, tenant=new_id()), await held(stage, tenant=new_id())
    await index(retrieval, other, "a ship")
    reach = Reach(ours.tenant_id, other.session_id)
    assert await retrieval.recall("ship vessel", reach=reach, session_id=ours.session_id, limit=8) == []


async def test_sources_narrow_the_search(stage: Stage, retrieval: Retrieval) -> None:
    claim = await held(stage)
    await index(retrieval, claim, "a ship", source="a")
    await index(retrieval, claim, "a ship", source="b")
    for tenant in (False, True):
        found = await recall(retrieval, claim, "ship", sources=["b"], tenant=tenant)
        assert [passage.source for passage in found] == ["b"]
        assert await recall(retrieval, claim, "ship", sources=[], tenant=tenant) == []


async def test_passages_of_deleted_sessions_are_gone(stage: Stage, retrieval: Retrieval) -> None:
    """Also between the tombstone and the removal of the rows, and their vectors go with them."""
    kept, deleted = await held(stage), await held(stage)
    await index(retrieval, kept, "a ship that stays")
    await index(retrieval, deleted, "a ship that goes")
    await stage.hand.execute("UPDATE sessions SET deleted_at = clock_timestamp() WHERE id = %s", (deleted.session_id,))
    for query in ("ship", "vessel"):
        assert texts(await recall(retrieval, kept, query, tenant=True)) == ["a ship that stays"]
    await stage.hand.execute("DELETE FROM passages WHERE session_id = %s", (deleted.session_id,))
    assert await has_vectors(stage) == 1


# -- vectors


async def test_meaning_finds_what_words_do_not(stage: Stage, retrieval: Retrieval, embedder: Embedder) -> None:
    claim = await held(stage)
    await index(retrieval, claim, "The vessel has left.", "A song for everybody.", "The levy is due.")
    assert texts(await recall(retrieval, claim, "boat", limit=1)) == ["The vessel has left."]
    assert embedder.calls[0] == ["The vessel has left.", "A song for everybody.", "The levy is due."]


async def test_what_both_rankings_have_comes_first(stage: Stage, retrieval: Retrieval) -> None:
    claim = await held(stage)
    await index(retrieval, claim, "left alone", "the ship left", "a vessel")
    found = await recall(retrieval, claim, "ship left")
    assert found[0].text == "the ship left"
    assert found[0].score == pytest.approx(2 / 61, abs=1e-6)


def test_fusion_counts_ranks_alone() -> None:
    a, b, c = ((UUID(int=n), "s", 0) for n in range(3))
    assert fuse([[a, b], [b, c]]) == [(b, 1 / 62 + 1 / 61), (a, 1 / 61), (c, 1 / 62)]
    assert fuse([]) == []


async def test_an_embedder_that_fails_leaves_full_text_and_one_line_and_is_made_up_for_later(
    stage: Stage, retrieval: Retrieval, embedder: Embedder, ticking: Ticking, caplog: pytest.LogCaptureFixture
) -> None:
    claim = await held(stage)
    await index(retrieval, claim, "a boat")
    embedder.error = ConnectionError("away")
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            await index(retrieval, claim, f"ship {n}", source=f"more {n}")
            assert len(await recall(retrieval, claim, "ship")) == n + 1
            ticking.seconds += LEFT_ALONE.total_seconds() * 2
    assert len([r for r in caplog.records if "the embedder fails" in r.message]) == 1
    assert await has_vectors(stage) == 1
    embedder.error = None
    assert len(await recall(retrieval, claim, "vessel")) == 4
    assert await has_vectors(stage) == 4


async def test_an_embedder_that_has_failed_is_left_alone_for_a_while(
    stage: Stage, retrieval: Retrieval, embedder: Embedder, ticking: Ticking
) -> None:
    claim = await held(stage)
    embedder.error = ConnectionError("away")
    for _ in range(5):
        assert await recall(retrieval, claim, "ship") == []
    assert len(embedder.calls) == 1
    ticking.seconds += LEFT_ALONE.total_seconds()
    assert await recall(retrieval, claim, "ship") == []
    assert len(embedder.calls) == 2


@pytest.mark.parametrize(
    "answer",
    [[], [[1.0]] * 9, [[]], [[float("nan")] * 5], [["x"]], None, [[0.0] * 17_000], 3],
    ids=["none", "too many", "empty", "nan", "text", "null", "too long", "number"],
)
async def test_nonsense_of_an_embedder_fails_nothing(
    stage: Stage, retrieval: Retrieval, embedder: Embedder, answer: object
) -> None:
    claim = await held(stage)
    embedder.answer = lambda texts: answer
    await index(retrieval, claim, "a ship")
    assert len(await recall(retrieval, claim, "ship")) == 1
    assert await has_vectors(stage) == 0


async def test_vectors_of_another_length_are_another_embedders(
    stage: Stage, retrieval: Retrieval, embedder: Embedder
) -> None:
    claim = await held(stage)
    await index(retrieval, claim, "a ship")
    embedder.answer = lambda texts: [[*vector, 1.0] for vector in embed(texts)]
    assert len(await recall(retrieval, claim, "ship")) == 1
    assert len(await recall(retrieval, claim, "vessel")) == 1
    assert await has_vectors(stage) == 2


async def test_many_passages_are_embedded_in_batches(stage: Stage, retrieval: Retrieval, embedder: Embedder) -> None:
    claim = await held(stage)
    await index(retrieval, claim, *(f"ship {n}" for n in range(2 * BATCH + 5)))
    assert [len(call) for call in embedder.calls] == [BATCH, BATCH, 5]
    assert await has_vectors(stage) == 2 * BATCH + 5


async def test_plain_embedders_that_hang_take_two_threads_and_no_more(stage: Stage) -> None:
    gate, started = Gate(), []

    def hanging(texts: list[str]) -> list[list[float]]:
        started.append(texts)
        gate.wait()
        return embed(texts)

    clock = Ticking()
    embedding = Embedding("tests:hanging", hanging, clock=clock.clock, timeout=timedelta(milliseconds=20))
    stuck = Retrieval(stage.db, embedding)
    await stuck.prepare()
    claim = await held(stage)
    try:
        for n in range(4):
            await index(stuck, claim, f"ship {n}", source=f"{n}")
            clock.seconds += 2 * LEFT_ALONE.total_seconds()
        assert len(started) == 2
        assert len(await recall(stuck, claim, "ship")) == 4
    finally:
        gate.set()


async def test_the_documented_index_serves_the_search_of_a_tenant(stage: Stage, retrieval: Retrieval) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "how-to" / "memory.md").read_text()
    made = guide.partition("```sql\n")[2].partition("```")[0]
    made = made.replace("vector(1536)", "vector(5)").replace("embedders:embed/1536", "tests:meaning/5")
    claim = await held(stage)
    await index(retrieval, claim, *(f"ship {n}" for n in range(20)))
    await stage.hand.execute(made.encode())
    statement = vectors.nearest_statement(Reach(claim.tenant_id, None), length=5)
    values = {
        "tenant": claim.tenant_id,
        "embedder": "tests:meaning/5",
        "sources": None,
        "limit": 4,
        "query": "[1,0,0,0,0]",
    }
    async with stage.db.transaction() as connection:
        for setting in ("enable_seqscan", "enable_sort", "enable_bitmapscan"):
            await connection.execute(text(f"SET LOCAL {setting} = off"))
        plan = "\n".join((await connection.execute(text(f"EXPLAIN {statement.text}"), values)).scalars())
    assert "passage_vectors_embedding_idx" in plan


# -- where there is no extension


@pytest.fixture
def unprivileged(stage: Stage) -> Iterator[str]:
    """A role that may use the tables, and make nothing."""
    role = f"plain_{new_id().hex}"
    with psycopg.connect(stage.url, autocommit=True) as admin:
        name = sql.Identifier(role)
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x'").format(name))
        admin.execute(sql.SQL("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
        admin.execute(sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {}").format(name))
        yield role
        admin.execute(sql.SQL("DROP OWNED BY {}").format(name))
        admin.execute(sql.SQL("DROP ROLE {}").format(name))


@pytest.fixture
async def plain_db(stage: Stage, unprivileged: str) -> AsyncIterator[Database]:
    db = Database(stage.url)

    @event.listens_for(db.engine.sync_engine, "connect")
    def become(connection: object, record: object) -> None:
        cursor = connection.cursor()  # type: ignore[attr-defined]
        cursor.execute(f'SET ROLE "{unprivileged}"')
        cursor.close()
        connection.commit()  # type: ignore[attr-defined]

    yield db
    await db.close()


async def test_a_role_without_rights_has_full_text_and_one_line(
    stage: Stage, plain_db: Database, embedder: Embedder, caplog: pytest.LogCaptureFixture
) -> None:
    claim = await held(stage)
    with caplog.at_level(logging.INFO):
        plain = Retrieval(plain_db, Embedding("tests:meaning", embedder.embed))
        await plain.prepare()
    assert [r.message for r in caplog.records if r.message.startswith("no vectors")]
    await index(plain, claim, "a ship")
    assert texts(await recall(plain, claim, "ship")) == ["a ship"]
    assert embedder.calls == []


async def test_a_postgres_without_the_extension_has_full_text(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert not await vectors.prepare(stage.db, extension="not_there")
    assert "no vectors: this Postgres has no extension pgvector; recall uses full text" in caplog.messages
    assert (await stage.one("SELECT to_regclass('passage_vectors') AS made"))["made"] is None


async def test_a_table_that_goes_away_leaves_full_text(stage: Stage, retrieval: Retrieval) -> None:
    claim = await held(stage)
    await index(retrieval, claim, "a ship")
    await stage.hand.execute("DROP TABLE passage_vectors")
    assert texts(await recall(retrieval, claim, "ship")) == ["a ship"]
    await index(retrieval, claim, "another ship", source="more")
    assert len(await recall(retrieval, claim, "ship")) == 2


async def test_workers_that_start_together_make_the_table_once(stage: Stage) -> None:
    assert await asyncio.gather(*(vectors.prepare(stage.db) for _ in range(6))) == [True] * 6


async def test_a_worker_that_could_not_wait_for_the_table_looks_again(
    stage: Stage, embedder: Embedder, ticking: Ticking
) -> None:
    late = Retrieval(stage.db, Embedding("tests:meaning", embedder.embed, clock=ticking.clock), clock=ticking.clock)
    async with stage.hand.transaction():
        await stage.hand.execute(f"SELECT pg_advisory_xact_lock({vectors.LOCK})")
        with pytest.raises(Unavailable):
            await late.prepare()
    claim = await held(stage)
    await index(late, claim, "a ship")
    assert embedder.calls == []

    ticking.seconds += AGAIN
    await index(late, claim, "a boat", source="more")

    assert await has_vectors(stage) == 1


@pytest.mark.parametrize("name", ["nowhere.to.be:found", "json:nothing", "json", "json:__doc__"])
def test_an_embedder_that_is_not_there_is_a_wrong_setting(name: str) -> None:
    with pytest.raises(ConfigError, match="LONGSHIFT_EMBEDDER"):
        load_embedder(name)


@pytest.mark.parametrize(
    "query", ["it's", "a\\b 'c", "x:* & !y | (z", "https://a.b/c\\d?e='f'", "''", "%s :tenant", "<->"]
)
async def test_no_query_is_read_as_syntax(stage: Stage, query: str) -> None:
    words, claim = Retrieval(stage.db), await held(stage)
    await index(words, claim, f"anchor {query} harbour", "something else")
    for tenant in (False, True):
        assert "something else" not in texts(await recall(words, claim, query, tenant=tenant))
        assert texts(await recall(words, claim, f"{query} anchor", tenant=tenant)) == [f"anchor {query} harbour"]


async def test_an_embedder_may_be_an_object_that_is_called_and_awaited() -> None:
    class Model:
        async def __call__(self, texts: list[str]) -> list[list[float]]:
            return embed(texts)

    assert await Embedding("tests:model", Model()).embed(["ship"]) == embed(["ship"])
