"""The built-in summarizer, and the cutting of texts: bounded, the same each time, nothing lost where nothing may be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longshift.extractive import summarize
from longshift.model import Json
from longshift.pieces import MOST, PIECE, pieces
from longshift.summaries import STRIDE
from longshift.tokens import Characters

count = Characters().count
contents = st.text(max_size=300) | st.dictionaries(st.text(max_size=5), st.integers(), max_size=3)
conversations = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents), min_size=1, max_size=40)


def said(*pairs: tuple[str, Json]) -> list[dict[str, Json]]:
    return [{"role": role, "content": content, "turn_id": None} for role, content in pairs]


def test_it_says_who_said_what_for_how_many_and_where_the_rest_is() -> None:
    text = summarize(
        said(("user", "Which ships are late? I need names."), ("assistant", {"late": ["Aurora"]})),
        tokens=200,
        count=count,
        of=2,
    )
    assert text.splitlines() == [
        "Summary of the first 2 messages of this session. turn.recall(query) finds what they said.",
        "- user: Which ships are late? I need names.",
        '- assistant: {"late":["Aurora"]}',
    ]


def test_it_names_artifacts_also_those_of_an_earlier_summary() -> None:
    first, second = "art_" + "1" * 32, "art_" + "2" * 32
    before = {
        "role": "system",
        "content": summarize(said(("user", f"see {first}")), tokens=200, count=count, of=1),
        "summary_of": 1,
    }
    shown: Json = {"$artifact": second, "size": 70_000, "preview": "col1,col2"}
    text = summarize([before, *said(("tool", shown))], tokens=200, count=count, of=2)
    assert f"Artifacts: {first}, {second}" in text.splitlines()
    assert f"- tool: {second} (70,000 bytes): col1,col2" in text.splitlines()
    assert f"- user: see {first}" in text.splitlines()


def test_of_too_much_the_beginning_and_the_newest_stay() -> None:
    text = summarize(
        said(*(("user", f"message {n} has many words, " * 20) for n in range(200))), tokens=300, count=count, of=200
    )
    lines = text.splitlines()
    assert "message 0 " in lines[1]
    assert lines[2].startswith("- (left out: ")
    assert "message 199 " in lines[-1]
    assert count(text) <= 300


@given(conversations, st.integers(20, 400))
def test_it_is_bounded_and_always_the_same(pairs: list[tuple[str, Json]], tokens: int) -> None:
    texts = {summarize(said(*pairs), tokens=tokens, count=count, of=len(pairs)) for _ in range(2)}
    assert len(texts) == 1
    assert count(texts.pop()) <= tokens


@given(st.text(alphabet="ab .\n", max_size=9000))
def test_pieces_are_all_of_a_text_and_bounded(text: str) -> None:
    found = pieces(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(0 < len(piece) <= PIECE for piece in found)


def test_pieces_end_where_paragraphs_or_sentences_do() -> None:
    paragraph = "One sentence of some length. " * 40
    assert pieces(f"{paragraph}\n\n{paragraph}") == [paragraph.strip(), paragraph.strip()]
    assert all(piece.endswith(".") for piece in pieces(paragraph * 10))


def test_the_pieces_of_a_huge_text_fit_between_two_messages() -> None:
    assert len(pieces("ab " * 5_000_000)) <= MOST < STRIDE
