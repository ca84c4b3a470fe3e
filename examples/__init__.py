"""Agents and programs to read and to run."""
