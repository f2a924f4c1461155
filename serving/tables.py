"""The tables of the documentation: written into its pages from the same data that the daemon runs on.

``python -m serving.tables`` rewrites the pages. A table stands between the lines ``<!-- table: NAME -->`` and
``<!-- end -->``; what is around it is written by hand.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cache.recipe.chain import ops_table

from .api.openapi import errors_table
from .arrivals.sources import sources_table
from .audit import acts_table
from .config import settings_table
from .metrics import metrics_table

PAGES: Final = Path(__file__).resolve().parent.parent / "docs"

TABLES: Final[dict[str, Callable[[], str]]] = {
    "settings": settings_table,
    "metrics": metrics_table,
    "errors": errors_table,
    "ops": ops_table,
    "sources": sources_table,
    "acts": acts_table,
}

_MARKED: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewritten(page: str) -> str:
    """The page's text with every table as it is now. Raises: KeyError for a table that there is not."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


def main() -> None:
    """Rewrite the pages that are out of date, and name them."""
    for path in sorted(PAGES.glob("*.md")):
        before = path.read_text()
        after = rewritten(before)
        if after != before:
            path.write_text(after)
            print(f"rewrote {path.name}")


if __name__ == "__main__":
    main()
