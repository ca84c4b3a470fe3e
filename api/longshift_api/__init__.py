"""The HTTP edge of Longshift: import longshift_api."""
