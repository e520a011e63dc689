"""Writes the tables of docs/benchmarks.md anew, from the results: ``python -m benchmarks.tables``.

A table stands between ``<!-- FILE.json -->`` and ``<!-- end -->``; FILE is one of
``benchmarks/results``. What is not measured yet is empty.
"""

import json
import re
from pathlib import Path

from benchmarks import report

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"


def filled(page: str) -> str:
    """The page with the tables of the results."""

    def table(match: re.Match[str]) -> str:
        file = RESULTS / match[1]
        rows = json.loads(file.read_text())[1:] if file.exists() else []
        return f"<!-- {match[1]} -->\n{report.markdown(rows)}<!-- end -->"

    return re.sub(r"<!-- (\w+\.json) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
