"""Agents of other frameworks, and tools of other servers, inside a turn. Each module needs its extra; none is imported here."""
