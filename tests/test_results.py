"""The repository's own tables are written by code: README section, docs, and the comparison with published orderings."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import published, solvers
from fastode import SOLVERS
from fastode.commands.compare import spec
from fastode.evaluate.results import read
from tests import comparison

ROOT = Path(__file__).parents[1]


@pytest.fixture
def results(tmp_path):
    return read(comparison.write(tmp_path / "compare.jsonl"))


def as_published(tmp_path, order):
    """A file with the published settings in which solver i of ``order`` is the i-th best at every number."""
    header, *records = comparison.records()
    made = [header, records[0]]
    for i, name in enumerate(order):
        for n in (5, 6):
            case = next(r for r in records if r.get("case") == f"unipc@{n}")
            label = published.AS_PUBLISHED[name]
            made.append({**case, "case": f"{label}@{n}", "label": label, "rmse": 0.1 + 0.01 * i, "frechet": 5.0 + i})
    path = tmp_path / "published.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in made))
    return read(path)


def test_the_solvers_of_the_results_exist():
    for name in solvers.SOLVED:
        assert spec(name).solver in SOLVERS
    for name, text in published.AS_PUBLISHED.items():
        assert spec(text).solver == name and spec(text).grid
    for table in published.TABLES.values():
        assert set(table) == set(published.AS_PUBLISHED)
        assert all(len(row) == len(published.NFES) for row in table.values())


def test_the_section_of_the_readme(results, tmp_path):
    text = solvers.section(*results)
    assert "94.1% of converged samples" in text and "| `unipc` | 0.35 | 0.215 | **0.147** | **0.108** |" in text
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- quality:begin -->\nold\n<!-- quality:end -->\nb\n")
    solvers.replace(readme, "quality", text)
    assert readme.read_text() == f"a\n<!-- quality:begin -->\n{text}\n<!-- quality:end -->\nb\n"
    with pytest.raises(ValueError, match="needs one pair of marks"):
        solvers.replace(readme, "nothing", text)


def test_the_marks_of_the_repository_are_there():
    for path, names in (("README.md", ["quality"]), ("docs/solvers.md", ["measured", "published"])):
        text = (ROOT / path).read_text()
        for name in names:
            assert text.count(f"<!-- {name}:begin -->") == text.count(f"<!-- {name}:end -->") == 1


def test_orderings_are_compared_by_rank(tmp_path):
    """CIFAR-10's own order at 5 evaluations has tau 1 with CIFAR-10, its reverse -1, and names the pairs that differ."""
    row = {name: values[published.NFES.index(5)] for name, values in published.CIFAR10.items()}
    best = sorted(row, key=row.__getitem__)
    text = solvers.orderings(*as_published(tmp_path, best))
    line = re.search(r"\| RMSE to converged and FID of CIFAR-10 \| (\S+) \|", text)
    assert line[1] == "1.00" and "- 5 evaluations" not in text
    text = solvers.orderings(*as_published(tmp_path, best[::-1]))
    assert re.search(r"\| Fréchet distance and FID of CIFAR-10 \| -1.00 \|", text)
    differing = re.search(r"- 5 evaluations: (.*)", text)[1]
    assert "`deis` before `ddim`" in differing and "`ddim` before" not in differing.replace(
        "`ddim` before `heun`", ""
    ).replace("`ddim` before `dpm_solver_2`", "")
