"""The Dockerfile, read: its stages and their instructions, and the command lines of the image."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass(frozen=True)
class Instruction:
    stage: str  # "": the last one, which becomes the image
    word: str  # RUN, COPY, ...
    rest: str


def instructions() -> list[Instruction]:
    """All of them, in order, continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not re.match(r"\s*(#|$)", line)]
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            named = re.search(r" AS (\w+)$", rest)
            stage = named[1] if named else ""
        found.append(Instruction(stage, word, rest.strip()))
    return found


def of_image(word: str) -> list[str]:
    """What follows an instruction of the last stage."""
    return [each.rest for each in instructions() if each.stage == "" and each.word == word]


def environment() -> dict[str, str]:
    pairs = [pair.partition("=") for rest in of_image("ENV") for pair in shlex.split(rest)]
    return {name: value for name, _, value in pairs}


def entrypoint() -> list[str]:
    [given] = of_image("ENTRYPOINT")
    words: list[str] = json.loads(given)
    return words


def sources() -> list[str]:
    """What is copied out of the repository."""
    copies = [each.rest.split() for each in instructions() if each.word == "COPY" and "--from" not in each.rest]
    return [source for *given, _ in copies for source in given]


def enters(path: str) -> bool:
    """Whether a file of the repository is sent to Docker: the last rule of .dockerignore that fits decides."""
    rules = [rule for rule in (ROOT / ".dockerignore").read_text().splitlines() if rule and not rule.startswith("#")]
    parents = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
    sent = True
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        if any(fnmatch(part, pattern) or fnmatch(part.rsplit("/", 1)[-1], pattern) for part in parents):
            sent = rule.startswith("!")
    return sent
