"""Samples that a type checker judges: see ``test_typing``."""
