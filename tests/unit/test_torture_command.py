"""``longshift torture``: what it prints, its exit codes, and what it says of files that cannot be put through it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from longshift.cli import main

FILE = """
import uuid
from longshift import Turn, agent, step
from longshift.testing import Effects, Scenario

@step
async def charge(key: str) -> str:
    print("charging")
    return "paid"

@agent("careless")
async def careless(turn: Turn, amount: int) -> str:
    return await charge(str(uuid.uuid4()))

@agent("careful")
async def careful(turn: Turn, amount: int) -> str:
    return await charge(str(turn.uuid()))

def torture() -> Scenario:
    bank = Effects()
    async def fake(key: str) -> str:
        bank.add("charge", key=key)
        return "paid"
    return Scenario(careless, 5, fake={charge: fake}, effects=bank)
"""


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Said]]:
    """Run the command in a folder that has ``shop.py``."""

    def calling(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["longshift", "torture", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Said(int(ended.value.code or 0), out, err)

    (tmp_path / "shop.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = set(sys.modules)
    yield calling
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_the_command_prints_a_row_for_each_point_and_says_last_what_is_broken(call: Callable[..., Said]) -> None:
    said = call("shop.py")
    assert said.code == 1
    lines = said.out.splitlines()
    assert len(lines) == 1 + 6 + 6 + 1 + 2
    row = "before step.completed charge crash died, another worker went on double charge charge"
    assert row in [" ".join(line.split()) for line in lines]
    assert lines[-1].startswith("6 crash points, 6 pauses, 4 doubled wake-ups: 3x double charge, at 'before step.")


def test_the_command_ends_with_0_if_no_promise_is_broken(call: Callable[..., Said]) -> None:
    said = call("shop.py:careful", "--input", "5")
    assert (said.code, said.out.splitlines()[-1]) == (
        0,
        "6 crash points, 6 pauses, 4 doubled wake-ups: no violation",
    )
    assert "charging" not in said.out  # what agents print is no data


def test_the_command_watches_steps_that_may_run_only_once(call: Callable[..., Said]) -> None:
    said = call("shop.py:careful", "--input", "5", "--once", "charge")
    assert said.code == 1
    assert "repeated charge, at 'before step.completed charge'" in said.out


def test_the_command_speaks_json(call: Callable[..., Said]) -> None:
    said = call("shop.py", "--json")
    report = json.loads(said.out)
    assert said.code == 1
    assert {name: report[name] for name in ("agent", "crash_points", "pauses", "doubled")} == {
        "agent": "careless",
        "crash_points": 6,
        "pauses": 6,
        "doubled": 4,
    }
    assert {
        "fault": "crash",
        "point": "before step.completed charge",
        "breach": "double",
        "subject": "charge",
        "text": "double charge",
    } in report["violations"]
    row = next(row for row in report["rows"] if row["fault"] == "pause" and row["point"].startswith("before step."))
    assert row["refused"] == ["step.completed charge"]
    assert row["repeated"] == {"charge": 1}


def test_the_input_of_a_scenario_may_be_replaced(call: Callable[..., Said]) -> None:
    assert "does not fit agent 'careless'" in call("shop.py", "--input", '"much"').err


@pytest.mark.parametrize(
    ("arguments", "text", "said"),
    [
        (["there_is.py"], None, "there is no file 'there_is.py'"),
        (["shop.py:nobody"], None, "'shop.py' has no one agent 'nobody': it defines careful, careless"),
        (["two.py"], FILE.replace("def torture", "def other"), "choose one with two.py:NAME (careful, careless)"),
        (["none.py"], "x = 1", "'none.py' defines no agent"),
        (["bad.py"], "import nothing_of_this_name", "cannot load 'bad.py': ModuleNotFoundError: No module named"),
        (["leaving.py"], "raise SystemExit(3)", "cannot load 'leaving.py': SystemExit: 3"),
        (["text.txt"], "x = 1", "'text.txt' is no Python file"),
        (
            ["odd.py"],
            FILE.replace("return Scenario(careless, 5,", "return dict("),
            "must return a longshift.testing.Sc",
        ),
        (
            ["worse.py"],
            FILE.replace("bank = Effects()\n", "1 / 0\n"),
            "torture() of 'worse.py' raised ZeroDivisionError",
        ),
        (["shop.py:careful", "--input", "{"], None, "INPUT is not JSON"),
        (["shop.py:careful"], None, "the input does not fit agent 'careful'"),
    ],
)
def test_what_cannot_be_tortured_is_said_in_a_sentence(
    call: Callable[..., Said], arguments: list[str], text: str | None, said: str
) -> None:
    if text is not None:
        Path(arguments[0]).write_text(text)
    answer = call(*arguments)
    assert answer.code == 2
    assert said in " ".join(answer.err.split())
