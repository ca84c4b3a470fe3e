"""The text of pages, as a reader sees it; and bytes of unknown encoding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshift.agents.html import decoded, page_text

PAGE = """<!DOCTYPE html><html><head><meta charset=utf-8><title>Leases &amp; epochs</title>
<style>p > a { color: red }</style><script>if (a < b) document.write("</p>")</script>
<body><h1>What a<br>lease is</h1><!-- <p>not > this --><p title="a > b">A lease is &lt;a right&gt;,
  and 1 < 2.</p><SCRIPT>var x = '<p>';</SCRIPT ><ul><li>one<li><a href='/?a>b'>two</a></ul>
<template><p>unseen</p></template><noscript>unseen</noscript><p>caf&eacute; &#8364;5<textarea>a <b></textarea>"""


def test_a_page_is_what_its_reader_sees() -> None:
    assert page_text(PAGE).split("\n\n") == [
        "Leases & epochs",
        "What a",
        "lease is",
        "A lease is <a right>, and 1 < 2.",
        "* one",
        "* two",
        "café €5a <b>",
    ]


@pytest.mark.parametrize(
    "page", ["a <p", "a <p title='", "a <!-- b", "a <script>b", "a <title>", "a <textarea", "a </"]
)
def test_a_page_that_breaks_off_is_read_as_far_as_it_goes(page: str) -> None:
    assert page_text(page).startswith("a")


@given(st.text())
def test_text_without_tags_keeps_its_words(text: str) -> None:
    plain = text.replace("<", "").replace("&", "")
    assert page_text(plain).split() == plain.split()


@given(st.text(alphabet="<>/!-'\"& apscriptle=&#;"))
def test_any_page_can_be_read(page: str) -> None:
    assert isinstance(page_text(page), str)


@pytest.mark.parametrize("piece", ['<a "', "<!--", "<", "<script ", "<title><", "<a '\"", "&#", "<p ", "</", "<?"])
def test_a_page_made_to_take_for_ever_does_not(piece: str) -> None:
    page_text(piece * 60_000)  # what is not linear in its length would meet the test's time limit


@pytest.mark.parametrize(
    ("body", "charset", "text"),
    [
        ("café".encode(), None, "café"),
        ("café".encode("latin-1"), "ISO-8859-1", "café"),
        ("€".encode("cp1252"), "latin1", "€"),
        ("€".encode("cp1252"), None, "€"),
        ("日本".encode("shift_jis"), "Shift_JIS", "日本"),
        ("日本".encode("utf-16"), None, "日本"),
        ("日本".encode("utf-8-sig"), "latin-1", "日本"),
        (b"<meta charset=koi8-r>" + "да".encode("koi8-r"), None, "<meta charset=koi8-r>да"),
        ("café".encode(), "no-such-thing", "café"),
        (b"xn--caf-dma", "punycode", "xn--caf-dma"),
        (b"a\xffb", "utf-8", "a\ufffdb"),
    ],
    ids=str,
)
def test_bytes_are_read_as_who_sent_them_meant(body: bytes, charset: str | None, text: str) -> None:
    assert decoded(body, charset=charset, is_html=True) == text
