"""`python -m quambase`: the command line."""

from quambase.cli.main import quambase

quambase(prog_name="quambase")
