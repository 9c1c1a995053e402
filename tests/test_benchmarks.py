"""The benchmarks' own parts: what they time is right, what they store is whole, and the GPU command refuses without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, overhead, roofline, run
from benchmarks.registry import CASES, SMALL, alternate, machine, store, summary, table, target
from fastode import SOLVERS
from fastode.backends import choose


def test_every_solver_has_a_case() -> None:
    assert {c.solver for c in CASES} == set(SOLVERS)


def test_times_are_taken_in_turns() -> None:
    order: list[str] = []
    times = alternate([lambda: order.append("a"), lambda: order.append("b")], 0.0, least=3)
    assert order == ["a", "b"] * 4 and [len(t) for t in times] == [3, 3]


def test_summary_and_target() -> None:
    assert summary([3.0, 1.0, 2.0])["median"] == 2 and summary([3.0, 1.0, 2.0])["best"] == 1
    assert target("t", 0.5, 1, at_most=True)["reached"] and not target("t", 0.5, 1, at_most=False)["reached"]


def test_store_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    store({"x": 1}, path)
    with pytest.raises(TypeError):
        store({"x": object()}, path)
    assert json.loads(path.read_text()) == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_machine_record() -> None:
    record = machine()
    assert record["torch"] == torch.__version__ and record["commit"] and record["cpu"]


def test_compare() -> None:
    def made(us: float) -> dict[str, Any]:
        return {"benchmark": "b", "figure": "us", "machine": machine(), "rows": [{"id": "r", "us": us}]}

    assert "0.5" in run.compare(made(4.0), made(2.0))
    with pytest.raises(ValueError, match="compare"):
        run.compare({**made(1.0), "benchmark": "other"}, made(1.0))


def test_overhead_row() -> None:
    row = overhead.measure_one(None, CASES[0], SMALL, 0.0, evaluations=5)
    assert row["evaluations"] == 5 and row["us_median"] > 0 and row["ratio"] is None


def test_same_sample_or_nothing_is_timed() -> None:
    with pytest.raises(AssertionError, match="disagree"):
        overhead.check(torch.ones(2), torch.ones(2) * 1.1, CASES[0])


@pytest.mark.parametrize(("solver", "options"), roofline.SOLVERS_TIMED[:2])
def test_formula_is_the_update(solver: str, options: dict[str, Any]) -> None:
    step = roofline.Step.of(solver, (2, 3, 5, 5), choose("auto", torch.device("cpu")), **options)
    formula = step.formula()
    assert formula is not None and roofline.agree(step, formula, "eager")


def test_gpu_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--smoke", "--out", str(path)]) == 0, capsys.readouterr()
    stored = json.loads(path.read_text())
    assert stored["smoke"] and set(stored["parts"]) == {"overhead", "roofline", "trajectory"} and not stored["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_refuses_without_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_tables() -> None:
    assert table(("a", "b"), [("x", None)]).splitlines()[-1] == "| x | - |"


def test_runtime_calls_are_timed_in_turns() -> None:
    from benchmarks import runtimes

    made = {"eager": runtimes.built(runtimes.tiny(), "eager", 2, Path())}
    (row,) = runtimes._calls(made, 2, 0.0, None, 2)
    assert row["us_median"] > 0 and row["times_faster"] == 1.0 and row["error"] == 0.0
    assert "| call | eager |" in runtimes.show({"rows": [row], "absent": {}})
