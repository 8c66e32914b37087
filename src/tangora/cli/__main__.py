"""``python -m tangora.cli``."""

from tangora.cli import main

main()
