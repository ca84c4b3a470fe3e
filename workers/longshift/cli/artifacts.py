"""Commands for artifacts: put, get, show."""

from __future__ import annotations

import hashlib
import sys
from contextlib import aclosing
from pathlib import Path
from typing import IO, Annotated

import typer

from longshift.cli.exits import EPILOG
from longshift.cli.local import ask
from longshift.cli.output import put as print_line
from longshift.cli.output import put_facts, put_json, say
from longshift.cli.show import AsJson
from longshift.client import ArtifactInfo, Client
from longshift.errors import ArtifactCorrupt, InvalidInput

app = typer.Typer(name="artifacts", help="Upload, download and look at artifacts.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="art_...")]


@app.command(epilog=EPILOG)
def put(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to upload; streamed.")],
    name: Annotated[str | None, typer.Option(help="Its name there; default: the file's.")] = None,
    content_type: Annotated[
        str, typer.Option("--type", help="Its media type; default: what the name says.")
    ] = "application/octet-stream",
    json: AsJson = False,
) -> None:
    """Upload a file. Prints the artifact's id."""
    made = ask(lambda client: client.upload(file, name=name, content_type=content_type))
    if json:
        put_json(made)
    else:
        print_line(made["id"])


@app.command(epilog=EPILOG)
def get(
    id_: Id,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
) -> None:
    """Download an artifact, to standard output or to a file, which is only there when all of it has come."""

    async def downloading(client: Client) -> ArtifactInfo:
        artifact = await client.artifact(id_)
        if output is None:
            await _download(client, artifact, sys.stdout.buffer)
            return artifact
        part = output.with_name(f"{output.name}.part")
        try:
            with part.open("wb") as file:
                await _download(client, artifact, file)
            part.replace(output)
        except OSError as error:
            raise InvalidInput(f"cannot write {str(output)!r}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)
        return artifact

    artifact = ask(downloading)
    if output is not None:
        say(f"{artifact['name']}: {artifact['size']:,} bytes", style="dim")


@app.command(epilog=EPILOG)
def show(
    id_: Id,
    url: Annotated[bool, typer.Option("--url", help="Print a URL from which anybody may download it.")] = False,
    expires_in: Annotated[int, typer.Option(min=1, max=604_800, help="Seconds for which the URL holds.")] = 3600,
    json: AsJson = False,
) -> None:
    """Name, type, size and hash of an artifact, or a URL for it."""
    if not url:
        artifact = ask(lambda client: client.artifact(id_))
        if json:
            put_json(artifact)
        else:
            put_facts({key: artifact[key] for key in ("id", "name", "content_type", "size", "sha256", "created_at")})
        return
    found = ask(lambda client: client.artifact_url(id_, expires_in=expires_in))
    if json:
        put_json(found)
        return
    print_line(found["url"])
    if not found["presigned"]:
        say("the artifact store cannot sign URLs: this one needs the API key", style="yellow")


async def _download(client: Client, artifact: ArtifactInfo, target: IO[bytes]) -> None:
    """
    Raises:
        ArtifactCorrupt: what came is something else.
    """
    digest = hashlib.sha256()
    async with aclosing(client.download(artifact["id"])) as chunks:
        async for chunk in chunks:
            digest.update(chunk)
            target.write(chunk)
    target.flush()
    if digest.hexdigest() != artifact["sha256"]:
        raise ArtifactCorrupt(f"{artifact['id']} did not come as it was stored: its hash is {digest.hexdigest()}")
