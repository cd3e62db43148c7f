"""The command line: verb -> function, nothing else."""

from resect.cli import shrinking, specializing  # their verbs register themselves
from resect.cli.commands import app, main

__all__ = ["app", "main", "shrinking", "specializing"]
