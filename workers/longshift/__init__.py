"""Longshift: a queue-driven worker fleet for agent jobs that take minutes to days and outlive their workers."""

__all__: list[str] = []
