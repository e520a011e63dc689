"""Files of results: a header, then one row for each case and contender."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(path: Path, objects: Sequence[dict[str, Any]]) -> None:
    """A JSON list with one object in each line."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, objects)) + "\n]\n")
