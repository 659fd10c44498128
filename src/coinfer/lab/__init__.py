"""Emulated links and machines, and the benchmark harness that runs on them; every figure of theirs says so."""
