"""``python -m longshift.cli``."""

from longshift.cli import main

main()
