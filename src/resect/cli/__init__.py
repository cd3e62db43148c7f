"""The command line: verb -> function, nothing else."""

from resect.cli import shrinking  # its verb registers itself
from resect.cli.commands import app, main

__all__ = ["app", "main", "shrinking"]
