"""Postgres: the only place where SQL is written. Each statement stands beside the one function that runs it."""
