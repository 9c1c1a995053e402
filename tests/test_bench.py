"""`fastode bench` and `fastode info`: the suites of the checkout, compared with a stored run; what is here and why not."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import run as suites
from benchmarks.registry import machine, report
from fastode import info
from fastode.backends import BACKENDS
from fastode.cli import main
from fastode.commands import bench


def made(us: float) -> dict:
    return report("overhead", "us_median", [{"id": "ddim", "us_median": us}], [])


@pytest.fixture
def fast(monkeypatch):
    """Suites that take no time, under the real names."""
    table = {
        name: (lambda quick: made(2.0), lambda result: f"shown {result['rows'][0]['us_median']}")
        for name in bench.SUITES
    }
    monkeypatch.setattr(suites, "BENCHMARKS", table)


def test_the_suites_are_those_of_the_checkout():
    assert set(bench.SUITES) == set(suites.BENCHMARKS)
    assert bench.checkout() is suites


def test_a_table_and_a_comparison_to_a_stored_run(fast, tmp_path, capsys):
    (tmp_path / "old.json").write_text(json.dumps(made(4.0)))
    argv = ["bench", "overhead", "--out", str(tmp_path / "out"), "--compare", str(tmp_path / "old.json")]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "shown 2.0" in shown and "| ddim | 4 | 2 | 0.5 |" in shown
    assert json.loads((tmp_path / "out" / "overhead.json").read_text())["rows"][0]["us_median"] == 2.0
    assert main([*argv[:4], "--compare", str(tmp_path)]) == 0  # a folder of reports
    assert "| ddim | 4 | 2 | 0.5 |" in capsys.readouterr().out


def test_bad_input(fast, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{}")
    for more, message in (
        (["speed"], "suites: must be among overhead, roofline, trajectory, cold, got 'speed'"),
        (["--threads", "0"], "threads: must be at least 1, got 0"),
        (["--compare", str(tmp_path / "no.json")], "compare: .* does not exist"),
        (["--compare", str(tmp_path / "bad.json")], "compare: .*bad.json is no stored report"),
    ):
        assert main(["bench", *more, "--out", str(tmp_path / "out")]) == 2
        assert re.match(f"fastode bench: {message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_installed_package_says_where_the_benchmarks_are(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(ImportError, match="part of the repository, not of the package"):
        bench.checkout()


def test_info_says_what_is_here_and_why_not(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path))
    assert "caches: " in info.report()
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "a").write_bytes(bytes(2**20))
    text = info.report()
    assert "fastode solutions       1 files, 1.0 MiB" in text
    assert "processor: " in text and f"{torch.get_num_threads()} threads" in text
    if not torch.cuda.is_available():
        assert "GPU: none (" in text
    for name in BACKENDS:
        assert f"  {name:<14}cpu: " in text
    record = info.machine()
    assert record["torch"] == torch.__version__ and record["cpu"] == machine()["cpu"]
    assert not any(str(Path.home()) in str(v) for v in record.values())
