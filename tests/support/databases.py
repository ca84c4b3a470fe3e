"""A fresh, migrated database per test, copied from a template that is migrated once per run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

TEMPLATE = "template_longshift"


def with_database(url: str, name: str) -> str:
    """The same server, another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}")).replace("postgresql:/?", "postgresql:///?")


def execute(url: str, statement: str, **names: str) -> None:
    """One statement outside a transaction; ``{placeholders}`` are identifiers."""
    with psycopg.connect(url, autocommit=True) as connection:
        query = sql.SQL(statement).format(**{key: sql.Identifier(name) for key, name in names.items()})
        connection.execute(query)


@dataclass
class Databases:
    """Makes databases on one server."""

    server_url: str
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def make_template(self) -> None:
        """Migrate the template, if there is a schema already."""
        execute(self.server_url, "CREATE DATABASE {name}", name=TEMPLATE)
        if find_spec("longshift.db") is not None and find_spec("longshift.db.migrations") is not None:
            from longshift.db import migrations  # late: most unit tests need no schema

            migrations.upgrade(with_database(self.server_url, TEMPLATE))

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of a copy of the template; dropped afterwards, whoever is still connected."""
        name = f"test_{next(self._numbers)}"
        execute(self.server_url, "CREATE DATABASE {name} TEMPLATE {template}", name=name, template=TEMPLATE)
        try:
            yield with_database(self.server_url, name)
        finally:
            execute(self.server_url, "DROP DATABASE {name} WITH (FORCE)", name=name)
