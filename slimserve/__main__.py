"""Run the command line: `python -m slimserve COMMAND`."""

from slimserve.cli import main

main()
