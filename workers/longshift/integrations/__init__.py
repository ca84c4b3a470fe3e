"""Longshift with other people's frameworks and protocols; each module needs the extra of its name."""
