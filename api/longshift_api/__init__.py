"""The HTTP edge of Longshift: ``create_app(config)`` makes the application, ``python -m longshift_api`` serves it."""

from longshift_api.app import create_app
from longshift_api.server import serve

__all__ = ["create_app", "serve"]
