"""Agents that come with Longshift."""
