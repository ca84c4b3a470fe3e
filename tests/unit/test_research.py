"""The research agent: it answers by quotation, and says what is wrong with a source."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import distribution
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshift import InvalidInput, Verdict
from longshift.agents.research import NO_ANSWER, Question, Report, markdown, plan, research
from longshift.agents.text import LONGEST, decode, passage_spans, sentence_spans
from longshift.testing import crash_points, run
from tests.support.http_servers import Running, running
from tests.support.web import Web

LEASES = """# Leases

A lease is the right to run a session. It belongs to one worker and carries an epoch,
which grows with every claim.

* The epoch is compared inside the write.
* A stale writer is refused with LeaseLost.

Wake-ups may be lost or doubled. They never carry state."""
COOKING = "Boil the water first. Then add salt, and wait. A worker in a kitchen rests while the water is heated."
SOURCES = [{"name": "cooking", "text": COOKING}, {"name": "leases", "text": LEASES}]
STORED = "art_" + "a" * 32


def ask(question: str, sources: list[dict[str, Any]], **more: Any) -> Report:
    return run(research, {"question": question, "sources": sources, **more}).output


def test_the_answer_is_quoted_from_the_source_that_has_it() -> None:
    report = ask("What is a lease?", SOURCES)
    assert report.answer.startswith("A lease is the right to run a session.")
    assert (report.citations[0].source, report.citations[0].passage) == ("leases", 0)


def test_the_report_numbers_its_quotations_and_lists_its_sources() -> None:
    result = run(research, {"question": "What happens to a stale writer?", "sources": SOURCES})
    text = result.artifacts["report.md"].decode()
    assert "> * A stale writer is refused with LeaseLost." in text
    assert "[1] leases, passage 0" in text
    assert "* cooking:" in text
    assert result.output.report.content_type.startswith("text/markdown")
    assert "".join(delta.text for delta in result.deltas).count("reading ") == 2


def test_what_the_sources_do_not_say_is_not_answered() -> None:
    report = ask("Who painted Guernica?", SOURCES)
    assert (report.answer, report.citations) == (NO_ANSWER, [])


def test_no_more_is_quoted_than_was_asked_for() -> None:
    assert len(ask("What about the worker, the epoch, the session?", SOURCES, max_quotes=2).citations) == 2


documents = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=4)
words = st.sampled_from(
    ["lease", "worker", "epoch.", "session,", "The", "A", "first\n\nThen\n*", "item", "is", "of", "```", "!", "?", "Ä"]
)
prose = st.lists(words, min_size=1, max_size=80).map(" ".join).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(prose, min_size=1, max_size=4) | documents, prose | st.text(min_size=1, max_size=200).filter(str.strip))
def test_every_quotation_is_a_verbatim_piece_of_its_source(texts: list[str], question: str) -> None:
    texts = [text for text in texts if "\0" not in text] or ["A lease."]
    sources = [{"name": f"s{n}", "text": text} for n, text in enumerate(texts)]
    report = ask(question[:2000], sources)
    for citation in report.citations:
        assert citation.quote.strip()
        assert citation.quote in texts[int(citation.source[1:])]


@given(st.text() | prose)
def test_passages_and_sentences_hold_all_of_a_text_in_its_order(text: str) -> None:
    for spans in (list(sentence_spans(text)), list(passage_spans(text))):
        assert [ends for pair in spans for ends in pair] == sorted(ends for pair in spans for ends in pair)
        kept = "".join(text[start:end] for start, end in spans)
        assert set("".join(text.split())) - set("\"')]*") <= set(kept)
    assert all(end - start <= LONGEST for start, end in sentence_spans(text))


@pytest.mark.parametrize("crash_after", crash_points(research, {"question": "What is a lease?", "sources": SOURCES}))
def test_the_research_survives_a_crash_anywhere(crash_after: int) -> None:
    asked = {"question": "What is a lease?", "sources": SOURCES}
    undisturbed, result = run(research, asked), run(research, asked, crash_after=crash_after)
    assert result.output.citations == undisturbed.output.citations
    assert result.artifacts == undisturbed.artifacts


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (b"", "is empty: leave it out"),
        (b" \n\t", "is empty: leave it out"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not UTF-8 text: convert it to plain text"),
        (b"text\0text", "is binary: convert it to plain text"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_with_what_to_do(raw: bytes, complaint: str) -> None:
    asked = {"question": "What?", "sources": [{"artifact": STORED, "name": "scan.pdf"}, *SOURCES]}
    error = run(research, asked, artifacts={STORED: raw}).error
    assert error is not None
    assert f"source 'scan.pdf' {complaint}" in error["message"]


def test_a_source_that_is_not_there_is_named() -> None:
    error = run(research, {"question": "What?", "sources": [{"artifact": STORED}]}).error
    assert error is not None
    assert f"there is no artifact {STORED}" in error["message"]


def test_a_source_that_is_too_large_is_refused() -> None:
    with pytest.raises(InvalidInput, match="split it"):
        decode(b"x" * (16 * 1024 * 1024 + 1), name="big")


@pytest.mark.parametrize(
    "wrong",
    [
        {"question": ""},
        {"question": "  "},
        {"question": "x" * 2001},
        {"sources": []},
        {"sources": SOURCES * 26},
        {"sources": [{"name": "empty", "text": " "}]},
        {"sources": [{"artifact": "nothing"}]},
        {"max_quotes": 0},
        {"surprise": 1},
    ],
    ids=str,
)
def test_an_input_that_does_not_fit_is_refused_before_it_starts(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        run(research, {"question": "What?", "sources": SOURCES} | wrong)


@given(st.text(min_size=1, max_size=300))
async def test_a_plan_has_one_to_five_queries_and_is_the_same_each_time(question: str) -> None:
    queries = await plan(question)
    assert 1 <= len(queries) <= 5
    assert queries == await plan(question)


def test_the_same_document_twice_is_quoted_once() -> None:
    report = ask("What is a lease?", [{"name": "a", "text": LEASES}, {"name": "b", "text": LEASES}])
    assert len({citation.quote for citation in report.citations}) == len(report.citations)
    assert {citation.source for citation in report.citations} == {"a"}


def test_a_report_stays_one_document_whatever_the_names() -> None:
    text = markdown("What\n# is?", [], [])
    assert text.splitlines()[0] == "# What # is?"


def real_documents() -> Iterator[dict[str, str]]:
    for name in ("celery", "httpx", "redis"):
        yield {"name": name, "text": str(distribution(name).metadata.json["description"])}


@pytest.mark.parametrize(
    ("question", "source"),
    [
        ("Which message brokers does Celery support?", "celery"),
        ("Does HTTPX support HTTP/2?", "httpx"),
        ("How do pipelines work in redis-py?", "redis"),
    ],
)
def test_real_documents_are_told_apart(question: str, source: str) -> None:
    report = ask(question, list(real_documents()))
    assert report.citations[0].source == source


@pytest.fixture
def web() -> Web:
    return Web()


@pytest.fixture
def site(web: Web, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("LONGSHIFT_FETCH_ALLOW", "127.0.0.1")
    with running(lambda: web.app) as site:
        yield site


def test_a_page_is_a_source_and_what_was_read_of_it_is_kept(web: Web, site: Running) -> None:
    page = "<title>Leases</title><script>x</script><p>A lease is the right to run a session.</p>"
    web.pages["/leases"] = 200, {"content-type": "text/html"}, page.encode()
    asked = {"question": "What is a lease?", "sources": [{"url": f"{site.url}/leases", "name": "manual"}, SOURCES[0]]}
    result = run(research, asked)
    assert result.output.citations[0].source == "manual"
    assert result.output.answer.startswith("A lease is the right")
    assert result.artifacts["source.txt"] == b"Leases\n\nA lease is the right to run a session."


def test_a_page_is_fetched_again_only_if_it_was_not_recorded(web: Web, site: Running) -> None:
    web.pages["/"] = 200, {"content-type": "text/plain; charset=utf-8"}, LEASES.encode()
    asked = {"question": "What is a lease?", "sources": [{"url": site.url}]}
    undisturbed = run(research, asked).output.citations
    assert undisturbed[0].source == site.url
    for point in crash_points(research, asked):
        before = len(web.asked)
        result = run(research, asked, crash_after=point)
        assert result.output.citations == undisturbed
        assert len(web.asked) - before == 1


def test_a_page_that_is_away_for_a_moment_is_asked_again(web: Web, site: Running) -> None:
    web.pages["/"] = [(503, {"retry-after": "60"}, b""), (200, {"content-type": "text/plain"}, LEASES.encode())]
    assert run(research, {"question": "What is a lease?", "sources": [{"url": site.url}]}).output.citations


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/missing", "source 'manual' cannot be fetched: it answered with HTTP 404"),
        ("/picture", "source 'manual' cannot be fetched: it is of type 'image/png', not text"),
        ("/empty", "source 'manual' is empty"),
    ],
)
def test_a_page_that_is_no_source_is_named_with_what_to_do(path: str, complaint: str, web: Web, site: Running) -> None:
    web.pages |= {"/picture": (200, {"content-type": "image/png"}, b""), "/empty": (200, {}, b"")}
    error = run(research, {"question": "What?", "sources": [{"url": site.url + path, "name": "manual"}]}).error
    assert error is not None
    assert complaint in error["message"]


def test_no_page_of_the_inside_is_a_source(web: Web, site: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LONGSHIFT_FETCH_ALLOW")
    result = run(research, {"question": "What?", "sources": [{"url": site.url}]})
    assert result.error is not None
    assert f"source '{site.url}' cannot be fetched: 127.0.0.1 is 127.0.0.1, which is not on" in result.error["message"]
    assert (web.asked, result.calls["download"]) == ([], 1)


def published(site: Running) -> dict[str, Any]:
    return {"question": "What is a lease?", "sources": SOURCES, "publish": {"webhook": f"{site.url}/hook"}}


def test_a_report_is_published_once_whatever_crashes(web: Web, site: Running) -> None:
    web.pages["/hook"] = 204, {}, b""
    result = run(research, published(site))
    assert result.output.publication is not None
    assert result.output.publication.status == "delivered"
    ((method, _, _, body),) = web.asked
    assert (method, body["answer"]) == ("POST", result.output.answer)
    assert body["report"] == result.artifacts["report.md"].decode()
    web.asked.clear()
    run(research, published(site), crash_at="before ledger.end publish")
    assert [method for method, _, _, _ in web.asked] == ["POST", "POST"]
    assert len({headers["idempotency-key"] for _, _, headers, _ in web.asked}) == 1


@pytest.mark.parametrize("granted", [True, False])
def test_a_report_is_published_if_somebody_agrees(granted: bool, web: Web, site: Running) -> None:
    web.pages["/hook"] = 204, {}, b""
    asked = published(site)
    asked["publish"]["approval"] = True
    report = run(research, asked, approve={"publish": Verdict(granted=granted, comment="as I said")}).output
    assert report.publication is not None
    assert (report.publication.status, len(web.asked)) == (("delivered", 1) if granted else ("declined", 0))


def test_a_report_that_cannot_be_published_is_still_there(web: Web, site: Running) -> None:
    web.pages["/hook"] = 403, {}, b""
    report = run(research, published(site)).output
    assert report.citations
    assert report.publication is not None
    assert (report.publication.status, "HTTP 403" in report.publication.reason) == ("failed", True)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://a.example", "http://", "https://me:hush@a.example/", "a.example", "http://a b"]
)
def test_an_address_that_is_none_is_refused_before_it_starts(url: str) -> None:
    with pytest.raises(InvalidInput):
        run(research, {"question": "What?", "sources": [{"url": url}]})
    with pytest.raises(InvalidInput):
        run(research, {"question": "What?", "sources": SOURCES, "publish": {"webhook": url}})


def test_its_schema_tells_clients_what_to_send() -> None:
    schema = research.describe().input_schema
    assert set(schema["properties"]) == {"question", "sources", "max_quotes", "publish"}
    assert Question.model_validate(schema["examples"][0]).max_quotes == 5
