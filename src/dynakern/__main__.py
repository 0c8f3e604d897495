"""Run the command line with ``python -m dynakern``."""

from dynakern.cli import main

main()
