"""An agent to begin with. Write yours beside it, and name its module in LONGSHIFT_AGENTS."""

from longshift import Turn, agent


@agent("greeting")
async def greeting(turn: Turn, name: str) -> str:
    """Greets, and remembers whom."""
    known = turn.state.get("names", [])
    names = [*known, name] if isinstance(known, list) else [name]
    await turn.state.set("names", names)
    return f"Hello {name}, you are number {len(names)}."
