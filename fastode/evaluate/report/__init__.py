"""From a file of results to what people look at: a page, pictures for papers, a table for a README."""

from __future__ import annotations

import os
from pathlib import Path

from fastode.evaluate.report.markdown import table
from fastode.evaluate.report.page import page
from fastode.evaluate.results import cases, read
from fastode.files import whole

__all__ = ["page", "table", "write_report"]


def write_report(results: str | os.PathLike[str], *, figures: bool = True) -> list[Path]:
    """Write <stem>.html, <stem>.md and (where matplotlib is installed) <stem>-*.png beside the results; returns the paths.

    Raises ``FileNotFoundError``, or ``ValueError`` where no case is finished yet.
    """
    header, records = read(results)
    target = Path(results)
    if not [c for c in cases(records) if c["case"] != "converged"]:
        raise ValueError(f"results: no case of {target} is finished yet")
    made = []
    for suffix, text in ((".html", page(header, records)), (".md", table(header, records))):
        with whole(target.with_suffix(suffix)) as part:
            part.write_text(text, encoding="utf-8")
        made.append(target.with_suffix(suffix))
    if figures:
        try:
            import matplotlib
        except ImportError:
            return made
        from fastode.evaluate.report.figures import write_figures

        made += write_figures(header, records, target.with_suffix(""))
    return made
