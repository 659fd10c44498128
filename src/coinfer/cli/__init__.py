"""The command line: parsing, calling, printing.  No computing lives here.

    main         runs one command and turns what went wrong into one line and an exit code
    app          the commands, one file each: inspect, build, profile, plan, evaluate, serve, run, bench, demo
    options      arguments and options that several commands share
    conditions   --rate, --rtt, --slowdown ... to Conditions; profiles of other machines
    output       JSON objects, tables, progress

Every command imports what it needs inside its function, so that `coinfer --help` is fast and
`coinfer run` loads nothing of torch.
"""

from .app import main

__all__ = ["main"]
