"""Real documents that are on every machine that installed Longshift, and questions about them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

SMALLEST = 1_000  # characters; a shorter description is not worth asking

QUESTIONS = {
    "celery": (
        "What is a task queue used for?",
        "Which message brokers does Celery support?",
        "What happens when the connection to the broker is lost?",
        "Which Python versions does Celery run on?",
    ),
    "kombu": ("Which transports does Kombu support?", "What is an exchange in messaging?"),
    "redis": ("How is redis-py made faster?", "How do pipelines work?", "How are connection pools used?"),
    "httpx": ("Does HTTPX support HTTP/2?", "Which features does HTTPX have beyond requests?"),
    "pydantic": ("How does Pydantic validate data?", "What was deprecated or removed in the changelog?"),
    "rich": ("What can Rich render in the terminal?", "How is a progress bar displayed?", "How does Rich log?"),
    "alembic": ("How are database migrations written?", "Does Alembic support transactional DDL?"),
    "SQLAlchemy": ("What is the philosophy of SQLAlchemy?", "What is the unit of work pattern?"),
    "fastapi": ("Why is FastAPI fast to code with?", "Which standards is FastAPI based on?", "Who uses FastAPI?"),
    "typer": ("How are command line options declared?", "What is Typer built on?"),
    "uvicorn": ("What is ASGI?", "Which protocols does Uvicorn support?"),
    "boto3": ("How are credentials configured for boto3?", "Which Python versions does boto3 still support?"),
    "starlette": ("What does Starlette depend on?", "How is a Starlette application tested?"),
}
COMPANIONS = 3  # further documents that each question is given, so that it has to search


def descriptions() -> Iterator[tuple[str, str]]:
    """(name, text): the long description of each package, from the metadata that was installed with it."""
    for name in QUESTIONS:
        try:
            text = str(distribution(name).metadata.json.get("description", ""))
        except PackageNotFoundError:
            continue
        if len(text) >= SMALLEST:
            yield f"{name}.md", text


def tasks(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(question, documents): each question about one document, which is hidden among others."""
    for place, name in enumerate(names):
        others = names[place + 1 :] + names[:place]
        for question in QUESTIONS[name.removesuffix(".md")]:
            yield question, [*others[:1], name, *others[1:COMPANIONS]]
