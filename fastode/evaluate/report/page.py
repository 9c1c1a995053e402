"""The page: one HTML file with everything in it, that opens anywhere and asks no network."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from fastode.evaluate.report.words import METRICS
from fastode.evaluate.results import Record, cases

HERE = Path(__file__).parent


def page(header: Record, records: list[Record]) -> str:
    """The page as text."""
    content = data(header, records)
    # "<" cannot end the script element that holds the data, whatever names of solvers and files are in it.
    embedded = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    text = (HERE / "page.html").read_text(encoding="utf-8")
    for name, part in (
        ("title", html.escape(f"Which solver for {content['model']}?")),
        ("css", (HERE / "page.css").read_text(encoding="utf-8").strip()),
        ("js", (HERE / "page.js").read_text(encoding="utf-8").strip()),
        ("data", embedded),
    ):
        text = text.replace("{{" + name + "}}", part)
    return text


def data(header: Record, records: list[Record]) -> dict[str, Any]:
    """What the page is given."""
    found = cases(records)
    s, model = header["settings"], header["model"]
    reference, features = s.get("reference"), s.get("features")
    solution = next((r for r in records if r["kind"] == "solution"), {})
    machine = header.get("machine", {})
    where = f"{machine.get('gpu') or machine.get('cpu', 'unknown')}, {machine.get('threads', '?')} threads"
    facts = f"{s['samples']:,} samples per case from the same seeds; network in {s['dtype']}"
    if s.get("guidance_scale") is not None:
        facts += f", guidance {s['guidance_scale']:g}"
    settings = [
        ("samples", f"{s['samples']:,} per case, seeds {s['first_seed']} to {s['first_seed'] + s['samples'] - 1}"),
        ("error bars", f"one standard error, by leaving out each of {s['blocks']} independent blocks of seeds"),
        (
            "levels",
            f"each solver, at every number of evaluations, on those with the least error on {s['screen']} samples",
        ),
        (
            "converged",
            f"UniPC of order 3 with {solution.get('steps')} steps; halving the step changes it by "
            f"{solution.get('change', 0):.2g} (RMS), less than {solution.get('bound', 0):g}",
        ),
        ("features", features["name"] if features else "none"),
        (
            "real images",
            "none"
            if not reference
            else f"{reference['name']}, {reference.get('count') or 'an unknown number of'} images",
        ),
        (
            "model",
            f"{model['name']}, weights {str(model.get('weights'))[:12]}, {model['prediction']}",
        ),
        ("machine", f"{where}, torch {machine.get('torch', '?')}, fastode {machine.get('fastode', '?')}"),
    ]
    if solution.get("frechet_floor") is not None:
        least = f"{solution['frechet_floor']:.4g}: what {s['samples']:,} perfect samples would get"
        settings.insert(5, ("Fréchet floor", least))
    return {
        "model": header["model"]["name"],
        "facts": facts,
        "first_seed": s["first_seed"],
        "metrics": METRICS,
        "cases": [c for c in found if c["case"] != "converged"],
        "converged": next((c for c in found if c["case"] == "converged"), None),
        "solution": solution,
        "settings": settings,
    }
