"""Runs the demo: see ``examples.demo``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.demo.documents import descriptions, tasks
from examples.demo.stack import Stack, StackError, running
from longshift.client import BatchInfo, Client, TurnInfo
from longshift.errors import LongshiftError

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 100.0  # seconds for the batch
CAPACITY = 4  # turns that a worker runs at a time: few, so that the batch takes several rounds
KILL_AT = 0.2  # of the batch has ended when a worker is killed

console = Console(width=None if sys.stdout.isatty() else 120)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--workers", type=int, default=3, help="worker processes, at least 2")
    parser.add_argument("--out", type=Path, default=ROOT / ".demo", help="where the report and the traces go")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    os.chdir(ROOT)  # the workers import examples.demo.agents from here
    try:
        return asyncio.run(demo(out, workers=max(2, options.workers)))
    except (StackError, LongshiftError, TimeoutError) as error:
        console.print(f"[red]The demo failed:[/] {str(error) or type(error).__name__}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


async def demo(out: Path, *, workers: int) -> int:
    """The whole story; the exit code."""
    data = Path(tempfile.mkdtemp(prefix="longshift-demo-"))
    step("Starting a local stack: PostgreSQL, Redis, the API and workers")
    try:
        async with (
            running(
                data=data, agents="examples.demo.agents", workers=workers, capacity=CAPACITY, tell=show_part
            ) as stack,
            Client(stack.url, stack.api_key) as client,
        ):
            async with asyncio.timeout(LIMIT):
                batch_id = await submit(client, out)
                killed = await watch(client, stack, batch_id, effects=out / "effects.jsonl")
            turns = [turn async for turn in client.results(batch_id)]
            step("Answers")
            show_answers(turns)
            report = await save_report(client, turns, out)
            step("Proof, by a program of its own: HTTP answers against the file of effects")
            verdict = await check(stack, out, batch_id=batch_id, killed=killed)
            step("Stopping the stack")
    finally:
        if (data / "logs").is_dir():
            shutil.copytree(data / "logs", out / "logs")
        shutil.rmtree(data, ignore_errors=True)
    if verdict == 0:
        console.print(f"\n[green]Done.[/] A report: {report}", highlight=False, soft_wrap=True)
    else:
        console.print(f"\n[red]The proof failed.[/] Traces and logs: {out}", highlight=False, soft_wrap=True)
    return verdict


async def submit(client: Client, out: Path) -> str:
    """Upload the documents, submit the questions as JSON lines; the batch's id."""
    step("Uploading documents that came with the installed packages")
    artifacts: dict[str, str] = {}
    for name, text in descriptions():
        info = await client.upload(text.encode(), name=name, content_type="text/markdown")
        artifacts[name] = info["id"]
    console.print(f"  {', '.join(artifacts)}", highlight=False)
    lines = [
        {
            "custom_id": f"q{number:02}",
            "agent": "demo-research",
            "input": {
                "question": question,
                "sources": [{"artifact": artifacts[name], "name": name} for name in names],
                "max_quotes": 4,
            },
            "metadata": {"effects": str(out / "effects.jsonl")},
        }
        for number, (question, names) in enumerate(tasks(list(artifacts)), start=1)
    ]
    path = out / "tasks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = await client.submit_batch(path, metadata={"demo": "yes"})
    step(f"Submitted {batch['total']} research tasks in one request: {batch['id']}")
    console.print("  Each step pretends to read for 0.4 to 1.2 s, so that there is time to be killed in.")
    return batch["id"]


async def watch(client: Client, stack: Stack, batch_id: str, *, effects: Path) -> int:
    """Show progress, and kill a worker in the middle; its process id."""
    killed = shown = 0
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} ended"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("research")
        while True:
            batch = await client.batch(batch_id)
            progress.update(bar, completed=batch["ended"], total=batch["total"], description=describe(batch))
            if not console.is_terminal and batch["ended"] >= shown + 5:
                shown = batch["ended"]
                console.print(f"  {describe(batch)} {shown:>2}/{batch['total']} ended", highlight=False)
            if not killed and batch["progress"] >= KILL_AT:
                ended = {turn["id"] async for turn in client.results(batch_id)}
                killed = kill_one(stack, effects, ended=ended)
            if batch["status"] == "ended":
                return killed
            await asyncio.sleep(0.2)


def kill_one(stack: Stack, effects: Path, *, ended: set[str]) -> int:
    """SIGKILL the worker that holds most turns; 0: none holds any just now."""
    last: dict[str, dict[str, Any]] = {}
    for line in effects.read_text().splitlines():
        effect = json.loads(line)
        last[effect["turn"]] = effect
    held: dict[int, list[str]] = defaultdict(list)
    for turn, effect in last.items():
        if turn not in ended and effect["step"] != "write":  # what is in its last step may end before the signal comes
            held[effect["pid"]].append(f"{turn[-6:]} in {effect['step']!r}")
    name, pid = max(stack.workers.items(), key=lambda worker: len(held[worker[1]]))
    if not held[pid]:
        return 0
    os.kill(pid, signal.SIGKILL)
    console.print(
        f"  [red]SIGKILL[/] to {name} (pid {pid}), which holds {len(held[pid])} turns: {', '.join(held[pid])}",
        highlight=False,
    )
    return pid


async def save_report(client: Client, turns: list[TurnInfo], out: Path) -> Path:
    """The report of a turn that lost its worker, or of the first one, copied out of the artifact store."""
    turn = next((t for t in turns if t["attempts"] > 1 and t["status"] == "succeeded"), turns[0])
    report = out / "report.md"
    if turn["status"] == "succeeded":
        with report.open("wb") as file:
            async for chunk in client.download(turn["output"]["report"]["id"]):
                file.write(chunk)
    return report


async def check(stack: Stack, out: Path, *, batch_id: str, killed: int) -> int:
    arguments = ["--stack", str(stack.stack_file), "--batch", batch_id, "--killed", str(killed), "--traces", str(out)]
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "examples.demo.check", *arguments)
    return await process.wait()


# -- showing


def step(text: str) -> None:
    console.print(f"[bold]{text}[/]", highlight=False)


def show_part(told: dict[str, Any]) -> None:
    if "part" in told:
        text = f"  {told['part']:<9} {told['state']:<9} {told.get('detail') or told.get('where', '')}"
        console.print(text.rstrip(), highlight=False, soft_wrap=True, markup=False)


def describe(batch: BatchInfo) -> str:
    counts = batch["counts"]
    return f"{counts.get('queued', 0):>2} queued {counts.get('running', 0):>2} running"


def show_answers(turns: list[TurnInfo]) -> None:
    table = Table(expand=True, pad_edge=False)
    table.add_column("task", width=4)
    table.add_column("tries", justify="right", width=5)
    table.add_column("quotes", justify="right", width=6)
    table.add_column("question", ratio=2, no_wrap=True, overflow="ellipsis")
    table.add_column("answer", ratio=3, no_wrap=True, overflow="ellipsis")
    for turn in turns:
        output = turn["output"] or {"answer": f"{turn['status']}: {turn['error']}", "citations": []}
        table.add_row(
            turn["custom_id"],
            str(turn["attempts"]),
            str(len(output["citations"])),
            escape(turn["input"]["question"]),
            escape(output["answer"]),
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
