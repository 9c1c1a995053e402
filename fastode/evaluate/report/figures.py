"""The same charts as PNG files for papers, by matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastode.evaluate.report.words import METRICS
from fastode.evaluate.results import Record, cases
from fastode.files import whole

COLORS = ("#2457d6", "#d1460b", "#17803d", "#9333b8", "#b8860b", "#0b7f95", "#c81e5b", "#5b4bd1", "#66700d", "#8a4b2a")
MARKERS = "os^DvPX<>"  # as many as colours, less one: colour and shape repeat together only after ninety solvers


def write_figures(header: Record, records: list[Record], stem: Path) -> list[Path]:
    """<stem>-<metric>.png (against evaluations and against time) for every metric, -steps.png and -planes.png."""
    found = [c for c in cases(records) if c["case"] != "converged"]
    converged = next((c for c in cases(records) if c["case"] == "converged"), {})
    solution = next((r for r in records if r["kind"] == "solution"), {})
    made = []
    for metric in METRICS:
        if any(c.get(metric) is not None for c in found):
            made.append(_figure(stem, metric, 2, partial(_quality, metric, found, converged, solution)))
    if any(c.get("truncation") for c in found):
        made.append(_figure(stem, "steps", 2, partial(_steps, found)))
    if solution.get("paths"):
        made.append(_figure(stem, "planes", 2, partial(_planes, found, solution)))
    return made


def _figure(stem: Path, name: str, columns: int, draw: Callable[[Any], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * columns, 3.3), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    draw(axes)
    for ax in axes:
        ax.grid(True, color="#ecebe7", linewidth=0.7)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    path = stem.with_name(f"{stem.name}-{name}.png")
    with whole(path) as part:
        figure.savefig(part, format="png")
    return path


def _style(label: str, found: list[Record]) -> dict[str, Any]:
    i = list(dict.fromkeys(c["label"] for c in found)).index(label)
    line = ("-", "--", ":")[i // len(COLORS) % 3]
    shape = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4.5}
    return {"color": COLORS[i % len(COLORS)], "linestyle": line, "linewidth": 1.3, **shape}


def _labels(found: list[Record]) -> list[str]:
    return list(dict.fromkeys(c["label"] for c in found))


def _quality(metric: str, found: list[Record], converged: Record, solution: Record, axes: Any) -> None:
    words = METRICS[metric]
    for ax, what, x_of in (
        (axes[0], "evaluations of the network", lambda c: c["nfe"]),
        (axes[1], "ms per image", lambda c: c.get("seconds_per_image") and 1000 * c["seconds_per_image"]),
    ):
        for label in _labels(found):
            own = [c for c in found if c["label"] == label and c.get(metric) is not None and x_of(c)]
            if own:
                x, y = [x_of(c) for c in own], [c[metric] for c in own]
                bars = [c.get(f"{metric}_se") or 0.0 for c in own]
                ax.errorbar(x, y, yerr=bars, label=label, elinewidth=0.9, **_style(label, found))
        if converged.get(metric) is not None:
            ax.axhline(converged[metric], color="#5c6066", linewidth=0.9, linestyle=":", label="converged")
        if metric == "frechet" and solution.get("frechet_floor") is not None:
            ax.axhline(
                solution["frechet_floor"], color="#5c6066", linewidth=0.9, linestyle="--", label="perfect samples"
            )
        ax.set_xlabel(what)
        ax.set_ylabel(words["name"])
        if words["better"] == "low":
            ax.set_yscale("log")
    axes[0].set_xticks(sorted({c["nfe"] for c in found}))
    axes[1].set_xscale("log")
    axes[1].legend(fontsize=7, frameon=False, ncols=2)


def _steps(found: list[Record], axes: Any) -> None:
    nfes = sorted({c["nfe"] for c in found})
    for ax, n in zip(axes, (nfes[len(nfes) // 2], nfes[-1]), strict=True):
        for c in found:
            if c["nfe"] == n and c.get("truncation"):
                points = [(s, e) for s, e in zip(c["sigmas"][1:], c["truncation"], strict=False) if s > 0]
                ax.plot(*zip(*points, strict=True), label=c["label"], **_style(c["label"], found))
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.invert_xaxis()
        ax.set_xlabel("noise level at which the step lands")
        ax.set_ylabel("local truncation error (RMS)")
        ax.set_title(f"{n} evaluations", fontsize=9)
    axes[-1].legend(fontsize=7, frameon=False, ncols=2)


def _planes(found: list[Record], solution: Record, axes: Any) -> None:
    nfes = sorted({c["nfe"] for c in found})
    for ax, n in zip(axes, (nfes[0], nfes[len(nfes) // 2]), strict=True):
        path = solution["paths"][0]
        ax.plot([p[0] for p in path], [p[1] for p in path], color="#1c1d1f", alpha=0.18, linewidth=5, label="converged")
        for c in found:
            if c["nfe"] == n and c.get("trajectories"):
                own = c["trajectories"][0]
                ax.plot([p[0] for p in own], [p[1] for p in own], label=c["label"], **_style(c["label"], found))
        ax.set_xscale("asinh")
        ax.invert_xaxis()
        ax.set_xlabel("first principal component")
        ax.set_ylabel("second principal component")
        ax.set_title(f"{n} evaluations", fontsize=9)
    axes[-1].legend(fontsize=7, frameon=False, ncols=2)
