"""`python -m kubegraft`, the same as the `kubegraft` command."""

from kubegraft.cli import main

main(prog_name="kubegraft")
