"""The catalogue names what does not fit, and where, in words that help."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from longshift.agents.research import research
from longshift.catalogue import Catalogue, Draft
from longshift.errors import InvalidInput, UnknownAgent
from longshift.model import AgentRecord

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def record(name: str, schema: dict[str, Any]) -> AgentRecord:
    return AgentRecord(
        name=name,
        version="1",
        queue="default",
        description="",
        input_schema=schema,
        output_schema={},
    )


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ({"name": "notes", "text": " \n"}, "input.sources[0].text", "is blank"),
        ({"name": "notes", "text": ""}, "input.sources[0].text", "'' should be non-empty"),
        ({"artifact": "art_1"}, "input.sources[0].artifact", "does not match"),
        ({"artifact": "art_1", "text": "both"}, "input.sources[0]", "is not valid under any of the given schemas"),
        ("notes.txt", "input.sources[0]", "is not valid under any of the given schemas"),
    ],
)
def test_a_value_that_fits_no_branch_of_a_union_is_compared_with_the_one_it_was_meant_for(
    source: object, path: str, message: str
) -> None:
    catalogue = Catalogue([record("research", research.input.json_schema())])
    with pytest.raises(InvalidInput) as refused:
        catalogue.new_turn(Draft("research", {"question": "What is a lease?", "sources": [source]}), now=NOW)
    assert refused.value.errors[0]["path"] == path
    assert message in str(refused.value.errors[0]["message"])


def test_of_many_agents_it_says_how_many_it_does_not_name() -> None:
    catalogue = Catalogue([record(f"agent-{n:02}", {}) for n in range(25)])
    with pytest.raises(UnknownAgent, match=r"known are agent-00, .*, agent-19 and 5 more\)"):
        catalogue.find("nobody")
