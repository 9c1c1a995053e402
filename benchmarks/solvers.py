"""The repository's own results, from the files of `fastode compare`: the README's section and docs/solvers.md.

    make results                        measures, then runs this
    python -m benchmarks.solvers        only writes the texts anew from benchmarks/results/*.jsonl

``compare.jsonl``: solvers of ``SOLVED``, each on its best levels. ``published.jsonl``: the settings of the papers'
tables (``published.AS_PUBLISHED``). What stands between marks is written by this file and by nobody else.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

from benchmarks.published import AS_PUBLISHED, NFES, TABLES, Table
from benchmarks.registry import RESULTS
from fastode.evaluate.report.markdown import footer, markdown_table, table
from fastode.evaluate.report.words import METRICS, shown
from fastode.evaluate.results import Record, cases, read
from fastode.files import whole

ROOT = Path(__file__).parents[1]
SOLVED = (
    "mnist/amed_unipc", "mnist/amed",
    "unipc", "dpm_solver_pp", "dpm_solver_pp_s", "deis", "ipndm", "ipndm_v", "lms", "ddim", "heun", "dpm_solver_2",
)  # fmt: skip
"""The solvers of the README's table: two learned ones of the box, and ten others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of compare.jsonl and published.jsonl")
    parser.add_argument("--readme", type=Path, default=None, help="write the section between its quality marks")
    parser.add_argument("--docs", type=Path, default=None, help="write what is measured in docs/solvers.md")
    parser.add_argument("--list", choices=["solved", "published"], help="print the solvers of a run, for the Makefile")
    a = parser.parse_args()
    if a.list:
        print(*(SOLVED if a.list == "solved" else AS_PUBLISHED.values()))
        return
    if a.readme is not None:
        replace(a.readme, "quality", section(*read(a.results / "compare.jsonl")))
    if a.docs is not None:
        compared = read(a.results / "compare.jsonl")
        picture = "![Error to the converged sample by evaluations and by time](solvers.png)\n\n"
        figures = table(*compared, metrics=["rmse", "frechet", "accuracy", "recall"]).strip()
        replace(a.docs, "measured", picture + figures)
        replace(a.docs, "published", orderings(*read(a.results / "published.jsonl")))


def replace(path: Path, name: str, text: str) -> None:
    """Put ``text`` between the marks ``name`` of a Markdown file."""
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path}: needs one pair of marks {begin} and {end}")
    head, rest = content.split(begin)
    with whole(path) as part:
        part.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def section(header: Record, records: list[Record]) -> str:
    """The README's words and table."""
    model, card = header["model"], header.get("card", {})
    converged = next(c for c in cases(records) if c["case"] == "converged")
    parameters = f" of {card['parameters'] / 1e6:.1f}M parameters" if "parameters" in card else ""
    lines = [
        f"`fastode.load('{model['name']}')`: an EDM-preconditioned, class-conditional U-Net{parameters}, trained on two CPU "
        f"cores ({card.get('images_seen', 0):,} images seen). An independent classifier reads the requested class in "
        f"{converged.get('accuracy', 0):.1%} of converged samples. What is left of the way to them after a few evaluations:",
        "",
        table(header, records, metrics=["rmse"]).split("\n\n**Cost**")[0],
        "",
        footer(header, records),
        "",
        "`make results` measures this with `fastode compare`; more measures, and what papers print, in "
        "[docs/solvers.md](docs/solvers.md).",
    ]
    return "\n".join(lines)


def orderings(header: Record, records: list[Record]) -> str:
    """Published FIDs beside ours in the published settings: how alike the orderings are, and where pairs differ."""
    names = {text: name for name, text in AS_PUBLISHED.items()}
    ours: dict[str, dict[int, Record]] = {}
    for case in cases(records):
        if case["label"] in names:
            ours.setdefault(names[case["label"]], {})[case["nfe"]] = case
    nfes = [n for n in NFES if sum(n in by for by in ours.values()) > 1]
    parts = []
    for metric in ("rmse", "frechet"):
        rows = []
        for solver, by in ours.items():
            cells = [shown(by[n].get(metric), metric) if n in by else "-" for n in nfes]
            rows.append([f"`{AS_PUBLISHED[solver]}`", *cells])
        name = METRICS[metric]["name"]
        head = f"{name[0].upper() + name[1:]} here, in the published settings:"
        parts.append(head + "\n\n" + markdown_table(["solver", *map(str, nfes)], rows))
    rows = []
    for metric in ("rmse", "frechet"):
        for data, published in TABLES.items():
            cells = [agreement(published, ours, metric, n) for n in nfes]
            rows.append([f"{METRICS[metric]['name']} and FID of {data}", *cells])
    parts.append(
        "Kendall's rank correlation between our ordering and the published one, by evaluations (1: the same order, -1: "
        "reversed):\n\n" + markdown_table(["", *map(str, nfes)], rows)
    )
    differing = [line for n in nfes if (line := disagreements(ours, n))]
    parts.append(
        "Pairs that all three published tables order one way and our RMSE the other way:\n\n"
        + ("\n".join(differing) if differing else "none.")
    )
    return "\n\n".join([*parts, footer(header, records)])


def agreement(published: Table, ours: dict[str, dict[int, Record]], metric: str, nfe: int) -> str:
    """Kendall's tau over the solvers that both have."""
    own = {s: by[nfe].get(metric) for s, by in ours.items() if nfe in by}
    both = [(published[s][NFES.index(nfe)], value) for s, value in own.items() if value is not None]
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(both, 2)]
    return f"{(sum(s > 0 for s in signs) - sum(s < 0 for s in signs)) / len(signs):.2f}" if signs else "-"


def disagreements(ours: dict[str, dict[int, Record]], nfe: int) -> str:
    found = []
    known = [s for s, by in ours.items() if nfe in by and by[nfe].get("rmse") is not None]
    for a, b in combinations(known, 2):
        if all(t[a][NFES.index(nfe)] > t[b][NFES.index(nfe)] for t in TABLES.values()):
            a, b = b, a
        if all(t[a][NFES.index(nfe)] < t[b][NFES.index(nfe)] for t in TABLES.values()):
            x, y = ours[a][nfe]["rmse"], ours[b][nfe]["rmse"]
            if x > y:
                found.append(f"`{a}` before `{b}` (here {x:.3g} and {y:.3g})")
    return f"- {nfe} evaluations: " + ", ".join(found) if found else ""


if __name__ == "__main__":
    main()
