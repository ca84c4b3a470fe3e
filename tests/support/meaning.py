"""An embedder without a model: one axis for each topic, on which words that mean the same point the same way."""

from __future__ import annotations

AXES = ("ship", "harvest", "music", "tax")
SYNONYMS = {"boat": "ship", "vessel": "ship", "song": "music", "levy": "tax", "crop": "harvest"}


def embed(texts: list[str]) -> list[list[float]]:
    found = []
    for text in texts:
        words = [SYNONYMS.get(word, word) for word in text.lower().replace(".", "").split()]
        found.append([float(words.count(axis)) for axis in AXES] + [0.01])
    return found
