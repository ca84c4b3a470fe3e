"""The text of an HTML page, and of other bytes whose encoding is in doubt. Pure, and linear in the size of its input: pages
come from strangers, and ``html.parser`` of some Python versions in use takes hours for a page made for that.
"""

from __future__ import annotations

import codecs
import html
import re

_UNSEEN = re.compile(r"(?:script|style|template|noscript|svg|math|iframe|object)\Z")
"""Elements whose content is not text of the page."""
_RAW = re.compile(r"(?:script|style|title|textarea)\Z")
_BLOCK = re.compile(
    r"(?:address|article|aside|blockquote|body|br|dd|div|dl|dt|figcaption|figure|footer|form|h[1-6]|header|hr|li|main|nav|ol|"
    r"p|pre|section|table|tbody|td|th|thead|title|tr|ul)\Z"
)
_NAME = re.compile(r"</?([a-zA-Z][a-zA-Z0-9-]{0,40})")
_UNTIL = re.compile(r"[^>\"']*")
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_ENCODINGS = re.compile(
    r"(?:ascii|utf-8|utf-16(?:-[bl]e)?|iso8859-\d+|cp\d+|koi8-[ru]|mac-roman|big5|gb\w+|shift_jis|euc_\w+|iso2022_\w+)\Z"
)
"""Of what Python decodes, only what the web uses: some of the others take for ever."""


def page_text(page: str) -> str:
    """What a reader sees of ``page``: paragraphs apart, white space as it is shown, the title first."""
    pieces: list[str] = []
    place = 0
    while (start := page.find("<", place)) != -1:
        pieces.append(_shown(page[place:start]))
        if page.startswith("<!--", start):
            end = page.find("-->", start + 4)
            place = len(page) if end == -1 else end + 3
            continue
        name = _NAME.match(page, start)
        if name is None and not page.startswith(("<!", "<?", "</"), start):
            pieces.append("<")  # a plain one, as in 1 < 2
            place = start + 1
            continue
        place = _tag_end(page, start)
        if name is not None:
            place = _element(page, name[1].lower(), closing=page[start + 1] == "/", place=place, pieces=pieces)
    pieces.append(_shown(page[place:]))
    lines = [" ".join(line.split()) for line in "".join(pieces).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _element(page: str, name: str, *, closing: bool, place: int, pieces: list[str]) -> int:
    """What the tag that ends at ``place`` means for the text; where reading goes on."""
    if _BLOCK.match(name):
        pieces.append("\n\n")
        if name == "li" and not closing:
            pieces.append("* ")
    if closing or not (_UNSEEN.match(name) or _RAW.match(name)):
        return place
    end = re.compile(rf"</{name}\b", re.IGNORECASE).search(page, place)
    until = end.start() if end else len(page)
    if not _UNSEEN.match(name):
        pieces.append(_shown(page[place:until]))
    return until


def _tag_end(page: str, place: int) -> int:
    """Behind the tag that begins at ``place``; the end of the page if it never ends. A ``>`` in quotes does not count."""
    while True:
        found = _UNTIL.match(page, place)
        place = found.end() if found else place
        if place >= len(page):
            return len(page)
        char = page[place]
        place += 1
        if char == ">":
            return place
        # looking in vain costs the rest of the page, but only the last quote of its kind is not closed by another
        closing = page.find(char, place)
        place = place if closing == -1 else closing + 1


def _shown(text: str) -> str:
    """Text between tags: white space is only white space, and entities are characters."""
    return html.unescape(text.replace("\n", " ").replace("\r", " "))


def decoded(body: bytes, *, charset: str | None, is_html: bool) -> str:
    """``body`` as text: by its byte order mark, its ``charset``, what the page says, as UTF-8, else as Windows-1252."""
    if body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return body.decode("utf-16", "replace")
    if body.startswith(codecs.BOM_UTF8):
        return body.decode("utf-8-sig", "replace")
    meta = _META.search(body[:2048]) if is_html else None
    for name in (charset, meta[1].decode() if meta else None):
        encoding = _encoding(name)
        if encoding is not None:
            return body.decode(encoding, "replace")
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body.decode("cp1252", "replace")


def _encoding(name: str | None) -> str | None:
    try:
        found = codecs.lookup(name or "").name
    except LookupError:
        return None
    # what calls itself ASCII or Latin-1 is Windows-1252 on the web (WHATWG, Encoding, 4.2)
    return ("cp1252" if found in ("ascii", "iso8859-1") else found) if _ENCODINGS.match(found) else None


__all__ = ["decoded", "page_text"]
