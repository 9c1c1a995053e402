"""A Markdown table for a README: solvers down, evaluations across, the best of each column in bold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastode.evaluate.report.words import METRICS, shown
from fastode.evaluate.results import Record, cases


def table(header: Record, records: list[Record], metrics: Sequence[str] | None = None) -> str:
    """One table per metric of ``metrics`` (default: all that were measured), each with its meaning above it."""
    found = [c for c in cases(records) if c["case"] != "converged"]
    converged = next((c for c in cases(records) if c["case"] == "converged"), {})
    names = [m for m in (metrics or METRICS) if any(c.get(m) is not None for c in found)]
    parts = [_one(m, found, converged) for m in names]
    parts.append(_times(found))
    return "\n\n".join([*parts, footer(header, records)]) + "\n"


def footer(header: Record, records: list[Record]) -> str:
    """How it was measured, in a sentence."""
    s, machine = header["settings"], header.get("machine", {})
    solution = next((r for r in records if r["kind"] == "solution"), {})
    text = (
        f"{s['samples']:,} samples from the same seeds, network in {s['dtype']}; after ± the standard error from {s['blocks']} "
        f"blocks of seeds. Each solver on the levels that gave the least error on {s['screen']} samples. Converged: "
        f"{solution.get('steps')} steps; halving them changes it by {solution.get('change', 0):.2g}."
    )
    if solution.get("frechet_floor") is not None:
        text += f" {s['samples']:,} perfect samples would get a Fréchet distance of {solution['frechet_floor']:.3g}."
    if machine.get("cpu"):
        where = machine.get("gpu") or machine["cpu"]
        text += f" Times on {where}, {machine.get('threads')} threads, torch {machine.get('torch')}."
    return text


def _one(metric: str, found: list[Record], converged: Record) -> str:
    words = METRICS[metric]
    nfes = sorted({c["nfe"] for c in found})
    by = {(c["label"], c["nfe"]): c for c in found}
    labels = list(dict.fromkeys(c["label"] for c in found))
    best = {}
    for n in nfes:
        values = [by[key][metric] for key in by if key[1] == n and by[key].get(metric) is not None]
        best[n] = (max if words["better"] == "high" else min)(values) if values else None

    def cell(label: str, n: int) -> str:
        case = by.get((label, n), {})
        value = case.get(metric)
        if value is None:
            return "failed" if "failed" in case else "-"
        text = shown(value, metric)
        return f"**{text}**" if value == best[n] else text

    def order(label: str) -> tuple[float, ...]:
        values = [by.get((label, n), {}).get(metric) for n in reversed(nfes)]
        sign = -1.0 if words["better"] == "high" else 1.0
        return tuple(float("inf") if v is None else sign * v for v in values)

    title = words["name"][0].upper() + words["name"][1:]
    extra = (
        f" The converged solution has {shown(converged[metric], metric)}." if converged.get(metric) is not None else ""
    )
    rows = [[f"`{label}`", *(cell(label, n) for n in nfes)] for label in sorted(labels, key=order)]
    return f"**{title}** by evaluations.{extra}\n\n" + markdown_table(["solver", *map(str, nfes)], rows)


def _times(found: list[Record]) -> str:
    rows: list[list[str]] = []
    for label in dict.fromkeys(c["label"] for c in found):
        own = [c for c in found if c["label"] == label and c.get("seconds_per_image")]
        if own:
            per = sorted(1000 * c["seconds_per_image"] / c["nfe"] for c in own)
            levels = sorted({c["grid"] for c in own}, key=lambda g: -sum(c["grid"] == g for c in own))
            rows.append(
                [f"`{label}`", f"{per[len(per) // 2]:.3g}", f"{own[0]['state_bytes'] / 1024:.0f}", ", ".join(levels)]
            )
    return "**Cost**\n\n" + markdown_table(
        ["solver", "ms per image and evaluation", "buffers per image, KiB", "levels"], rows
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])
