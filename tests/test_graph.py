"""Recorded runs. What is not CUDA's is tested with a recorder that replays by calling the body again; the tests marked
``gpu`` use real graphs."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import nn

from fastode import Denoiser, Engine
from fastode.buckets import Buckets, plan
from fastode.denoisers import clipped
from fastode.graph import GraphError, Graphs
from fastode.program.trace import Trace
from fastode.schedules import EDM, karras
from fastode.shelf import Ring, Shelf, pays
from fastode.solvers import SOLVERS
from tests.conftest import relative

SHAPE = (3, 2, 4, 4)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
gpu = lambda test: GPU[0](GPU[1](test))  # noqa: E731


class Replayer:
    """A recorder without a device: a replay is one more execution of what was recorded, on the same memory."""

    bakes = False

    def __init__(self, *, replayed: float = 0.5, bytes_each: int = 1000) -> None:
        self.replayed, self.bytes_each = replayed, bytes_each
        self.recorded, self.replays, self.marks, self.waits, self._used = 0, 0, 0, 0, 0

    def pool(self):
        return object()

    def record(self, body, pool):
        body()
        self.recorded += 1
        self._used += self.bytes_each

        def replay():
            self.replays += 1
            body()

        return replay

    def enter(self, mark):
        assert mark is None or mark <= self.marks

    def leave(self):
        self.marks += 1
        return self.marks

    def seconds(self, work, repeats):
        work()
        return 1.0, (self.replayed if work.__name__ == "replay" else 1.0)

    def used(self):
        return self._used

    def wait(self):
        self.waits += 1


class Net(nn.Module):
    """Depends on the level, the label and a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, c_noise, class_labels=None, shift=None):
        column = (-1, *[1] * (x.ndim - 1))
        y = self.weight * torch.tanh(x) + 0.1 * c_noise.reshape(column)
        if class_labels is not None:
            y = y * (1 + 0.1 * class_labels.reshape(column))
        return y if shift is None else y + shift


def noisy_program(steps=3):
    trace = Trace(karras(EDM(), steps))
    trace.consistent = False
    x = trace.start()
    for s, t in itertools.pairwise(trace.grid):
        ratio = t.sigma / s.sigma
        x = trace.land(ratio * x + (1 - ratio) * trace.denoise(x, s) + 0.3 * t.sigma * trace.noise(), t)
    return trace.program(x)


def denoiser(device="cpu") -> Denoiser:
    return Denoiser(Net().to(device), num_classes=4, null_label=3)


def pair(program, graphs, *, shape=SHAPE, guidance=None, backend="torch", device="cpu", **options):
    """An engine that records and one that does not."""
    d = denoiser(device)
    return [
        Engine(program, d, shape, backend, guidance=guidance, check_finite=False, graph=graph, **options)
        for graph in (graphs, False)
    ]


# -- book-keeping ----------------------------------------------------------------------------------------------------


def test_plan():
    assert plan(5, (1, 8, 4)) == [(0, 5, 8)]
    assert plan(20, (1, 4, 8)) == [(0, 8, 8), (8, 8, 8), (16, 4, 4)]
    assert plan(1, (1, 8)) == [(0, 1, 1)]
    with pytest.raises(ValueError, match="9 samples"):
        plan(9, (8,), "error")
    with pytest.raises(ValueError, match="at least 1"):
        plan(0, (8,))


def test_shelf_drops_the_least_recently_used_that_nobody_holds():
    shelf: Shelf[str] = Shelf(100)
    for name in "abc":
        assert shelf.put(name, name.upper(), 30) == []
    for name in "abc":
        shelf.release(name)
    assert shelf.take("a") == "A" and shelf.keys() == ["b", "c", "a"]
    assert shelf.put("d", "D", 50) == ["B", "C"] and shelf.size == 80
    with pytest.raises(GraphError, match="20 bytes left"):
        shelf.put("e", "E", 30)  # a and d are held
    assert shelf.take("b") is None and shelf.take("a") == "A"
    shelf.drop(lambda key: key == "a")
    assert shelf.keys() == ["d"]


def test_ring():
    ring = Ring(2)
    a, b, c, d = (ring.take(lambda: torch.zeros(1)) for _ in range(4))
    assert a is not b and c is a and d is b


def test_verdict():
    assert pays(2e-3, 1e-3, 1e-3)[0] and "1.000 ms replayed, 2.000 ms without" in pays(2e-3, 1e-3, 1e-3)[1]
    assert not pays(1e-4, 1e-3, 0.99e-3)[0]
    assert not pays(0.0, 0.0, 0.0)[0]


# -- runs on fixed memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_numbers_change_between_replays(name):
    """Start, labels, guidance strength and a condition are new in every call, the recording is not."""
    recorder = Replayer()
    recorded, plain = pair(SOLVERS[name](karras(EDM(), 4)), Graphs(True, recorder=recorder), guidance=True)
    for k in range(3):
        call = {
            "x": torch.randn(SHAPE) * 80,
            "seeds": [k, 8, 9],
            "class_labels": torch.tensor([k, 1, 2]),
            "guidance_scale": torch.tensor([1.0 + k, 2.0, 0.0]) if k else 3.0,
            "cond": {"shift": torch.full((3, 1, 1, 1), 0.1 * k)},
        }
        assert relative(recorded(**call), plain(**call)) < 1e-6
    assert (recorder.recorded, recorder.replays) == (1, 4)  # one more for the measurement


def test_seeds_and_given_noise():
    recorder = Replayer()
    recorded, plain = pair(noisy_program(), Graphs(True, recorder=recorder))
    for seeds in ([1, 2, 3], [7, 8, 9]):
        assert torch.equal(recorded(seeds=seeds), plain(seeds=seeds))
    noise = [torch.randn(SHAPE) for _ in range(3)]
    x = torch.randn(SHAPE)
    assert torch.equal(recorded(x, noise=noise), plain(x, noise=noise))
    assert recorder.recorded == 2  # noise from seeds and given noise are two kinds of call


def test_samples_are_the_callers():
    recorded, _ = pair(SOLVERS["ddim"](karras(EDM(), 3)), Graphs(True, recorder=Replayer()))
    first = recorded(seeds=[1, 2, 3])
    kept = first.clone()
    out = torch.zeros(SHAPE)
    assert recorded(seeds=[4, 5, 6], out=out) is out
    assert torch.equal(first, kept) and not torch.equal(out, kept)
    ringed, _ = pair(SOLVERS["ddim"](karras(EDM(), 3)), Graphs(True, recorder=Replayer(), ring=2))
    addresses = [ringed(seeds=[k, 1, 2]).data_ptr() for k in range(4)]
    assert addresses[:2] == addresses[2:] and addresses[0] != addresses[1]
    with pytest.raises(ValueError, match="out: must be"):
        recorded(seeds=[1, 2, 3], out=torch.zeros(1))


def test_auto_records_the_second_call_and_where_it_pays():
    recorder = Replayer()
    recorded, plain = pair(SOLVERS["unipc"](karras(EDM(), 4)), Graphs("auto", recorder=recorder))
    assert torch.equal(recorded(seeds=[1, 2, 3]), plain(seeds=[1, 2, 3])) and recorder.recorded == 0
    assert torch.equal(recorded(seeds=[1, 2, 3]), plain(seeds=[1, 2, 3])) and recorder.recorded == 1
    assert "graph pays" in recorded.report()[0]["verdict"]
    recorder = Replayer(replayed=1.0)
    recorded, plain = pair(SOLVERS["unipc"](karras(EDM(), 4)), Graphs("auto", recorder=recorder))
    rows = recorded.warmup()
    assert "does not pay" in rows[0]["verdict"] and "does not pay" in rows[1]["reason"]
    before = recorder.replays
    assert torch.equal(recorded(seeds=[1, 2, 3]), plain(seeds=[1, 2, 3])) and recorder.replays == before


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), 0

    def forward(self, x, c_noise):
        self.calls += 1
        if self.calls == 7:  # four calls without a graph, then the third of the recording
            raise RuntimeError("it looked at a number")
        return x * self.weight


def test_a_failure_names_the_network_call():
    program = SOLVERS["ddim"](karras(EDM(), 4))
    build = lambda mode: Engine(  # noqa: E731
        program, Denoiser(Broken()), SHAPE, "torch", check_finite=False, graph=Graphs(mode, recorder=Replayer())
    )
    engine = build("auto")
    for _ in range(3):  # it goes on without
        assert engine(seeds=[1, 2, 3]).shape == SHAPE
    (row,) = engine.report()
    assert "network call 2 (step 2, sigma" in row["reason"] and "looked at a number" in row["reason"]
    engine = build(True)
    engine.denoiser.network.calls = 4
    with pytest.raises(GraphError, match="network call 2"):
        engine(seeds=[1, 2, 3])


def test_what_cannot_be_recorded_says_why():
    program = SOLVERS["ddim"](karras(EDM(), 3))
    d = denoiser()
    engine = Engine(program, d, SHAPE, "torch", graph=Graphs(True, recorder=Replayer()), check_finite=True)
    with pytest.raises(GraphError, match="check_finite"):
        engine(seeds=[1, 2, 3])
    clip = clipped(d)
    engine = Engine(program, clip, SHAPE, "torch", graph=Graphs(True, recorder=Replayer()), check_finite=False)
    with pytest.raises(GraphError, match="transforms"):
        engine(seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Engine(program, d, SHAPE, "torch", device="cpu", graph=True)
    with pytest.raises(ValueError, match="'auto', True or False"):
        Engine(program, d, SHAPE, graph="yes")


def test_budget():
    recorder = Replayer(bytes_each=1000)
    graphs = Graphs(True, recorder=recorder, budget=2500)
    program, d = SOLVERS["ddim"](karras(EDM(), 3)), denoiser()
    engines = [Engine(program, d, (b, 2, 4, 4), "torch", check_finite=False, graph=graphs) for b in (1, 2, 3)]
    for engine in engines:
        engine.warmup()
    assert recorder.recorded == 3 and recorder.waits == 1  # the first was dropped, after its replays had ended
    engines[0](seeds=[1])
    assert recorder.recorded == 4
    tiny = Engine(
        program, d, (4, 2, 4, 4), "torch", check_finite=False, graph=Graphs(True, recorder=recorder, budget=10)
    )
    with pytest.raises(GraphError, match="budget"):
        tiny(seeds=range(4))


def test_a_network_that_was_moved_is_recorded_anew():
    recorder = Replayer()
    recorded, plain = pair(SOLVERS["ddim"](karras(EDM(), 3)), Graphs(True, recorder=recorder))
    recorded.warmup()
    with torch.no_grad():
        recorded.denoiser.network.weight.fill_(0.2)  # in place: the recording reads it
    assert torch.equal(recorded(seeds=[1, 2, 3]), plain(seeds=[1, 2, 3])) and recorder.recorded == 1
    recorded.denoiser.network.weight.data = torch.tensor(0.4)
    assert torch.equal(recorded(seeds=[1, 2, 3]), plain(seeds=[1, 2, 3])) and recorder.recorded == 2


def test_closed():
    recorded, plain = pair(SOLVERS["ddim"](karras(EDM(), 3)), Graphs(True, recorder=Replayer()))
    recorded.warmup()
    recorded.close()
    assert recorded.report() == []
    with pytest.raises(ValueError, match="closed"):
        recorded(seeds=[1, 2, 3])
    assert plain(seeds=[1, 2, 3]).shape == SHAPE


def check_threads(recorded, plain, device="cpu"):
    """Each thread keeps to its own seeds; what it gets is what it would get alone."""
    wanted = {k: plain(seeds=[k, k + 1, k + 2]) for k in range(4)}
    failures: list[str] = []

    def work(k: int) -> None:
        for _ in range(10):
            if relative(recorded(seeds=[k, k + 1, k + 2]), wanted[k]) > 1e-6:
                failures.append(f"thread {k}")

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_threads():
    check_threads(*pair(noisy_program(), Graphs(True, recorder=Replayer())))


def test_inference_mode_and_outside_share_a_recording():
    recorded, plain = pair(SOLVERS["unipc"](karras(EDM(), 3)), Graphs(True, recorder=Replayer()))
    with torch.inference_mode():
        recorded(seeds=[1, 2, 3])
    assert torch.equal(recorded(seeds=[4, 5, 6]), plain(seeds=[4, 5, 6]))


@pytest.mark.parametrize("graph", [False, True])
def test_buckets(graph):
    program, d = noisy_program(), denoiser()
    graphs = Graphs(True, recorder=Replayer()) if graph else False

    def make(batch):
        return Engine(program, d, (batch, 2, 4, 4), "torch", guidance=True, check_finite=False, graph=graphs)

    buckets = Buckets(make, (2, 4))
    for batch in (1, 2, 3, 7):
        call = {
            "seeds": list(range(batch)),
            "class_labels": [k % 3 for k in range(batch)],
            "guidance_scale": torch.arange(batch, dtype=torch.float64),
            "cond": {"shift": torch.arange(batch).reshape(-1, 1, 1, 1) * 0.1},
        }
        wanted = Engine(program, d, (batch, 2, 4, 4), "torch", guidance=True, graph=False)(**call)
        assert relative(buckets(**call), wanted) < 1e-6
    assert next(row["padding"] for row in buckets.report()) == 0.25  # 1 of 2, 2 of 2: 1 of 4 thrown away
    with pytest.raises(ValueError, match="x: give"):
        buckets()
    with pytest.raises(ValueError, match="largest bucket"):
        Buckets(make, (2,), oversize="error")(seeds=[1, 2, 3])


# -- on a device -----------------------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_graph_is_the_uncaptured_run(name, backend):
    program = SOLVERS[name](karras(EDM(), 4))
    guided = backend == "triton"  # only tables on the device can change between replays
    recorded, plain = pair(program, Graphs(True), guidance=guided, backend=backend, device="cuda")
    for k in range(2):
        call = {"seeds": [k, 1, 2], "class_labels": [k, 1, 2]} | ({"guidance_scale": 2.0 + k} if guided else {})
        assert relative(recorded(**call), plain(**call)) < 2e-5


@gpu
def test_weights_from_the_host_are_not_recorded_where_they_may_change():
    recorded, _ = pair(SOLVERS["ddim"](karras(EDM(), 3)), Graphs(True), guidance=True, backend="torch", device="cuda")
    with pytest.raises(GraphError, match="from the host"):
        recorded(seeds=[0, 1, 2], class_labels=[0, 1, 2], guidance_scale=2.0)


@gpu
def test_noise_and_per_sample_strength_in_a_graph():
    recorded, plain = pair(noisy_program(), Graphs(True), guidance=True, backend="triton", device="cuda")
    for k in range(3):
        call = {
            "seeds": [k, 1, 2],
            "class_labels": [0, k, 2],
            "guidance_scale": torch.tensor([k, 1.0, 2.0]),
            "cond": {"shift": torch.full((3, 1, 1, 1), 0.1 * k, device="cuda")},
        }
        assert relative(recorded(**call), plain(**call)) < 2e-5


@gpu
def test_no_waits_and_no_allocations():
    recorded, _ = pair(SOLVERS["unipc"](karras(EDM(), 5)), Graphs(True, ring=2), backend="triton", device="cuda")
    x = torch.randn(SHAPE, device="cuda")
    for _ in range(3):
        recorded(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            recorded(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@gpu
def test_threads_and_streams_on_a_device():
    recorded, plain = pair(noisy_program(), Graphs(True), backend="triton", device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        check_threads(recorded, plain)
    side = torch.cuda.Stream()
    wanted = plain(seeds=[1, 2, 3])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = recorded(seeds=[1, 2, 3])
    torch.cuda.current_stream().wait_stream(side)
    assert relative(got, wanted) < 2e-5


@gpu
def test_a_network_that_waits_is_reported():
    class Waits(Net):
        def forward(self, x, c_noise, class_labels=None):
            return super().forward(x, c_noise) * (1.0 + 0 * float(x.sum()))

    program = SOLVERS["ddim"](karras(EDM(), 3))
    make = lambda mode: Engine(program, Denoiser(Waits().cuda()), SHAPE, "triton", graph=mode)  # noqa: E731
    with pytest.raises(GraphError, match="network call 0"):
        make(True)(seeds=[1, 2, 3])
    engine = make("auto")
    for _ in range(3):
        assert engine(seeds=[1, 2, 3]).isfinite().all()
    assert "network call 0" in engine.report()[0]["reason"]


# -- numbers made in the run -----------------------------------------------------------------------------------------


def looks(p: Trace):
    """Inner levels chosen by what the network offers: told to it in the next call, and in the tables of two updates."""
    x = p.start()
    for s, t in itertools.pairwise(p.grid):
        d = p.denoise(x, s)
        (r,) = p.late(("r",), lambda f: (0.2 + 0.6 * torch.sigmoid(f.mean((1, 2, 3))),), outputs=("bottleneck",))
        u = p.grid.between(s, t, r)
        y = p.keep(u.sigma / s.sigma * x + (1 - u.sigma / s.sigma) * d)
        x = p.land(x + (t.sigma - s.sigma) / u.sigma * (y - p.denoise(y, u)), t)
    return x


class Looking(Net):
    def forward(self, x, c_noise, class_labels=None, features=False):
        raw = super().forward(x, c_noise, class_labels)
        return (raw, {"bottleneck": x.mean((2, 3), keepdim=True)}) if features else raw


def check_made_numbers(recorder, backend, device):
    trace = Trace(karras(EDM(), 3))
    program = trace.program(looks(trace))
    d = Denoiser(Looking().to(device), num_classes=4, null_label=3)
    graphs = Graphs(True, recorder=recorder)
    recorded, plain = (
        Engine(program, d, SHAPE, backend, guidance=True, check_finite=False, graph=g) for g in (graphs, False)
    )
    for seed, scale in ((0, 1.0), (5, 2.0), (9, torch.tensor([0.0, 1.0, 3.0]))):  # one recording serves all
        call = {"seeds": range(seed, seed + 3), "class_labels": [0, 1, 2], "guidance_scale": scale}
        assert relative(recorded(**call), plain(**call)) < 1e-6  # float32, the same sums in the same order
    assert len(recorded.report()) == 1


def test_made_numbers_in_a_recording():
    check_made_numbers(Replayer(), "torch", "cpu")


@gpu
def test_made_numbers_in_a_graph():
    check_made_numbers(None, "triton", "cuda")
