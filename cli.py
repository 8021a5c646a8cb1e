"""Runs the command line from a checkout, for launchers that take a file: `accelerate launch cli.py convert ...`."""

from flexdistill.cli import main

if __name__ == "__main__":
    main()
