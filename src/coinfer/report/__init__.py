"""What people read: tables, pictures, and the rows of docs/results.

table     rankings, candidates, measured cells and regime maps as text tables (terminal, Markdown)
plots     the same as pictures; needs matplotlib, so it is imported only where a picture is drawn
results   docs/results/NAME.json and NAME.md, and the raw logs from which they are recomputed
"""

from .results import Results, Row, read_raw, read_results, results_markdown, write_raw, write_results
from .table import (
    BenchCell,
    TextTable,
    bench_table,
    markdown,
    plain_text,
    ranking_table,
    regime_table,
    rich_table,
)

__all__ = [
    "BenchCell",
    "Results",
    "Row",
    "TextTable",
    "bench_table",
    "markdown",
    "plain_text",
    "ranking_table",
    "read_raw",
    "read_results",
    "regime_table",
    "results_markdown",
    "rich_table",
    "write_raw",
    "write_results",
]
