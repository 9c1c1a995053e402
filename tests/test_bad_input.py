"""Bad input: a clear error before any work, or at the stage where it first shows; and what a call leaves as it was."""

import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastode
from fastode import SOLVERS, Denoiser, Engine, NonFiniteError, models
from fastode.backends import BACKENDS
from fastode.denoisers import Gaussian, clipped
from tests import tiny_model
from tests.conftest import relative

RUNS = ["reference", *(n for n in ("torch", "native") if BACKENDS[n].missing(torch.device("cpu")) is None)]
GRID = [80.0, 9.0, 1.0, 0.1]
on_each = pytest.mark.parametrize("backend", RUNS)


class Counted:
    """A denoiser that counts its calls and keeps what it was told."""

    def __init__(self, spoil: int | None = None, value: float = float("nan")) -> None:
        self.calls, self.sigmas, self.spoil, self.value = 0, [], spoil, value

    def __call__(self, x, sigma):
        self.calls += 1
        self.sigmas.append(float(sigma))
        d = x / (1 + sigma**2)
        if self.spoil == self.calls - 1:
            d = d.clone()
            d.view(-1)[-1] = self.value
        return d


def x_(*shape: int, **kwargs) -> torch.Tensor:
    return 80 * torch.randn(*(shape or (3, 5)), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        **kwargs
    )


# -- before any work -----------------------------------------------------------------------------------------------

META = x_(dtype=torch.float32).to("meta")
BAD_CALLS = {
    # grids
    "not decreasing": ({"grid": [1.0, 2.0, 0.5]}, ValueError, "sigma: levels must decrease strictly"),
    "repeated level": ({"grid": [2.0, 2.0, 0.5]}, ValueError, "sigma: levels must decrease strictly"),
    "nan level": ({"grid": [2.0, float("nan")]}, ValueError, "sigma: every level must be finite, got nan at level 1"),
    "infinite level": (
        {"grid": [float("inf"), 1.0]},
        ValueError,
        "sigma: every level must be finite, got inf at level 0",
    ),
    "negative level": ({"grid": [1.0, -0.5]}, ValueError, "sigma: levels cannot be negative, got -0.5 at level 1"),
    "one level": ({"grid": [1.0]}, ValueError, "sigma: a grid needs at least two levels"),
    "no level": ({"grid": []}, ValueError, "sigma: a grid needs at least two levels"),
    "grid by name": ({"grid": "karras"}, TypeError, "grid: must be a Grid or a sequence of EDM-frame sigmas, got str"),
    "no grid": ({"grid": None}, ValueError, "grid: give a grid, or nfe to have one made"),
    "grid and nfe": ({"nfe": 5}, ValueError, "grid: give a grid, or nfe to have one made, not both"),
    # solvers and their options
    "solver": (
        {"solver": "dpm_solvr_pp"},
        ValueError,
        "solver: unknown solver 'dpm_solvr_pp'; did you mean 'dpm_solver_pp'",
    ),
    "solver object": ({"solver": 7}, ValueError, "solver: unknown solver 7; known are .*unipc"),
    "option": ({"solver": "unipc", "ordr": 2}, TypeError, "unipc: unknown option 'ordr'; did you mean 'order'?"),
    "foreign option": (
        {"solver": "ddim", "corrector": True},
        TypeError,
        "ddim: unknown option 'corrector'; known are .*eta",
    ),
    "eta": ({"solver": "ddim", "eta": 1.5}, ValueError, r"eta: must be in \[0, 1\], got 1.5"),
    "ratio": ({"solver": "dpm_solver_2", "r": 0.0}, ValueError, "r: "),
    "ratios": ({"solver": "dpm_solver_3", "r1": 0.8, "r2": 0.5}, ValueError, "r1"),
    "prediction": ({"solver": "dpm_solver_pp", "prediction": "v"}, ValueError, "prediction: .*x0.*eps.*got 'v'"),
    "variant": ({"solver": "unipc", "variant": "bh3"}, ValueError, "variant: .*bh1.*bh2.*got 'bh3'"),
    "space": ({"solver": "deis", "space": "x"}, ValueError, "space: .*'t'.*'rho'.*got 'x'"),
    # the number of evaluations
    "nfe 0": ({"grid": None, "nfe": 0}, ValueError, "nfe: must be a whole number of at least 1, got 0"),
    "nfe 2.5": ({"grid": None, "nfe": 2.5}, ValueError, "nfe: must be a whole number"),
    "nfe 4": (
        {"grid": None, "nfe": 4, "solver": "dpm_solver_3"},
        ValueError,
        "nfe: .* cannot make exactly 4 .* 2, 3, 5",
    ),
    "nfe afs": ({"grid": None, "nfe": 5, "solver": "heun", "afs": False}, ValueError, "nfe: heun cannot .* 4, 6"),
    # the state
    "x of integers": (
        {"x": torch.ones(3, 5, dtype=torch.int64)},
        TypeError,
        "x: must be floating point, got torch.int64",
    ),
    "complex x": ({"x": torch.ones(3, 5, dtype=torch.complex64)}, TypeError, "x: must be floating point"),
    "list": ({"x": [[1.0, 2.0]]}, TypeError, "x: must be a tensor.*, got list"),
    "no x": ({"x": None}, ValueError, "x: give the state at the first level, or seeds"),
    "seeds without a shape": ({"x": None, "seeds": [1, 2]}, ValueError, "x: give the state .* knows its sample shape"),
    "no batch": ({"x": torch.ones(5)}, ValueError, r"shape: must be \(B, \*sample\) with positive sizes, got \[5\]"),
    "empty batch": ({"x": torch.ones(0, 5)}, ValueError, r"shape: must be \(B, \*sample\) with positive sizes"),
    # what else comes with a call
    "seeds": ({"seeds": [1, 2]}, ValueError, r"seeds: need one per sample \(3\), got 2"),
    "fractional seeds": ({"seeds": [1, 2, 0.5]}, ValueError, "seeds: must be whole numbers"),
    "labels": ({"class_labels": [0, 1, 2]}, ValueError, "class_labels: Counted is not class-conditional"),
    "guidance": ({"guidance_scale": 2.0}, ValueError, "guidance_scale: guidance needs a condition"),
    "guidance, two conditions": (
        {"guidance_scale": 2.0, "cond": {"text": META}},
        ValueError,
        "cond: Counted takes no argument 'text'",
    ),
    "backend": ({"backend": "refrence"}, ValueError, "backend: must be one of auto, .*did you mean 'reference'"),
    "callback": ({"callback": "print"}, TypeError, "callback: must take .step, sigma, state, denoised., got str"),
    "draws": ({"solver": "ddim", "eta": 1.0, "noise": [x_()]}, ValueError, "noise: this program makes 3 draws, got 1"),
    "one draw": (
        {"solver": "ddim", "eta": 1.0, "noise": 3},
        TypeError,
        "noise: must be a list of tensors or a function",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@on_each
def test_bad_calls_compute_nothing(name, backend):
    changes, error, message = BAD_CALLS[name]
    d = Counted()
    arguments = {"x": x_(), "solver": "heun", "grid": GRID, "backend": backend, **changes}
    with pytest.raises(error, match=f"^{message}") as caught:
        fastode.sample(d, arguments.pop("x"), **arguments)
    assert d.calls == 0
    assert "\n" not in str(caught.value)


ORDERS = {name: s.options["order"] for name, s in SOLVERS.items() if "order" in s.options}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("order", [0, -1, 17, 2.5, "2", None, True])
def test_orders_that_a_solver_does_not_have(name, order):
    """The message lists those it has, and every one of them compiles."""
    with pytest.raises(ValueError, match=rf"^order: {name} has orders [\d, ]+, got ") as caught:
        SOLVERS[name](GRID, order=order)
    listed = [int(n) for n in str(caught.value).split("orders ")[1].split(", got")[0].split(", ")]
    assert ORDERS[name] in listed
    for n in listed:
        assert SOLVERS[name](GRID, order=n).nfe > 0


def test_unknown_solvers_are_suggested():
    for wrong, right in {"eular": "euler", "unipcc": "unipc", "DDIM": "ddim", "ipndm-v": "ipndm_v"}.items():
        with pytest.raises(KeyError, match=f"did you mean .*'{right}'"):
            SOLVERS[wrong]
    assert "unipcc" not in SOLVERS
    assert "euler" in SOLVERS
    assert SOLVERS["euler"] is SOLVERS["ddim"]


BAD_ENGINES = {
    "program": ({"program": "ddim"}, TypeError, "program: must be a Program such as SOLVERS"),
    "denoiser": ({"denoiser": 3}, TypeError, "denoiser: must be a Denoiser or a callable"),
    "shape": ({"shape": (3,)}, ValueError, r"shape: must be \(B, \*sample\)"),
    "dtype": ({"dtype": torch.float16}, ValueError, "dtype: the state is float32 or float64, got torch.float16"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: must be one of"),
    "backend elsewhere": ({"backend": "native", "device": "meta"}, ValueError, "backend: 'native' cannot run on meta"),
    "device": ({"denoiser": tiny_model.network(), "device": "meta"}, ValueError, "device: the network is on cpu"),
}


@pytest.mark.parametrize("name", BAD_ENGINES)
def test_bad_engines_are_not_built(name):
    changes, error, message = BAD_ENGINES[name]
    arguments = {"program": SOLVERS["ddim"](GRID), "denoiser": Counted(), "shape": (3, 5), **changes}
    with pytest.raises(error, match=f"^{message}"):
        Engine(**arguments)


@on_each
def test_bad_states_for_an_engine(backend):
    d = Counted()
    engine = Engine(SOLVERS["ddim"](GRID), d, (3, 5), backend)
    for x, error, message in (
        (x_(2, 5), ValueError, r"x: this engine was built for shape \[3, 5\], got \[2, 5\]"),
        (x_(3, 5, 1), ValueError, "x: this engine was built for shape"),
        (torch.ones(3, 5, dtype=torch.int32), TypeError, "x: must be floating point, got torch.int32"),
        (META, ValueError, "x: is on meta, the engine on cpu"),
        ([1.0], TypeError, "x: must be a tensor.*, got list"),
        (None, ValueError, "x: give the state at the first level, or seeds"),
    ):
        with pytest.raises(error, match=f"^{message}"):
            engine(x)
    with pytest.raises(ValueError, match=r"^guidance_scale: this engine was built without guidance"):
        engine(x_(), guidance_scale=2.0)
    assert d.calls == 0
    assert engine(x_()).shape == (3, 5)


def test_a_denoiser_knows_its_sample_shape():
    d = Denoiser(tiny_model.network(), sample_shape=(1, 8, 8), num_classes=3, null_label=3, name="tiny")
    with pytest.raises(ValueError, match=r"^shape: tiny makes samples of shape \[1, 8, 8\], got \[3, 8, 8\]"):
        fastode.sample(d, x_(2, 3, 8, 8), solver="ddim", grid=GRID)
    for labels in ([0, 4], [-1, 0]):
        with pytest.raises(ValueError, match=r"^class_labels: must be in 0 .. 3, got"):
            fastode.sample(d, x_(2, 1, 8, 8), solver="ddim", grid=GRID, class_labels=labels)
    with pytest.raises(ValueError, match=r"^seeds: need at least one"):
        fastode.sample(d, seeds=[], solver="ddim", grid=GRID)
    assert fastode.sample(d, seeds=[1, 2], solver="ddim", grid=GRID).shape == (2, 1, 8, 8)


# -- during the run ------------------------------------------------------------------------------------------------


@on_each
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("stage", "step", "sigma"), [(0, 0, "80"), (3, 1, "1"), (5, 2, "0.1")])
@pytest.mark.parametrize("watched", [False, True])
def test_non_finite_outputs_name_stage_and_sigma(backend, value, stage, step, sigma, watched):
    """One bad element stops the run at its stage. Heun evaluates each step at its start and at its end."""
    d = Counted(spoil=stage, value=value)
    engine = Engine(SOLVERS["heun"](GRID), d, (3, 5), backend)
    callback = (lambda *_: None) if watched else None
    with pytest.raises(
        NonFiniteError, match=rf"^network: .*NaN or Inf at stage {stage} \(step {step}, sigma {sigma}\)"
    ):
        engine(x_(), callback=callback)
    assert d.calls == stage + 1
    with pytest.raises(ValueError, match=r"^network:"):  # a ValueError, for callers who do not know the class
        Engine(SOLVERS["heun"](GRID), Counted(spoil=0), (3, 5), backend)(x_())
    again = engine(x_())  # the engine is as good as new
    assert torch.equal(again, Engine(SOLVERS["heun"](GRID), Counted(), (3, 5), backend)(x_()))


@on_each
def test_non_finite_outputs_under_a_clip_and_under_guidance(backend):
    """Clipping would hide an infinity: the network's own output is what is looked at."""
    with pytest.raises(NonFiniteError, match="stage 1"):
        fastode.sample(clipped(Counted(spoil=1, value=float("inf"))), x_(), solver="ddim", grid=GRID, backend=backend)

    def network(x, c, class_labels):
        return torch.where(class_labels[:, None] == 1, float("nan"), x)

    d = Denoiser(network, num_classes=1, null_label=1)
    with pytest.raises(NonFiniteError, match="stage 0"):
        fastode.sample(d, x_(), solver="ddim", grid=GRID, class_labels=0, guidance_scale=2.0, backend=backend)


@on_each
def test_unchecked_nan_passes_through(backend):
    x = x_()
    spoilt = fastode.sample(Counted(spoil=1), x, solver="ddim", grid=GRID, backend=backend, check_finite=False)
    clean = fastode.sample(Counted(), x, solver="ddim", grid=GRID, backend=backend)
    wrong = torch.isnan(spoilt)
    assert wrong.sum() == 1
    assert bool(wrong[-1, -1])
    assert torch.equal(spoilt[~wrong], clean[~wrong])  # elementwise: no other element notices


@on_each
def test_errors_of_the_network_reach_the_caller(backend):
    class Broken(RuntimeError):
        pass

    def network(x, sigma):
        if float(sigma) < 5:
            raise Broken("out of order")
        return x * 0

    engine = Engine(SOLVERS["ddim"](GRID), network, (3, 5), backend)
    for _ in range(2):
        with pytest.raises(Broken, match="out of order"):
            engine(x_())


@on_each
def test_draws_of_another_shape(backend):
    for bad, error, message in (
        (torch.zeros(3, 4), ValueError, "noise: draw 1 must have shape"),
        (0.5, TypeError, "noise"),
    ):
        d = Counted()
        with pytest.raises(error, match=f"^{message}"):
            fastode.sample(
                d, x_(), solver="ddim", eta=1.0, grid=GRID, noise=[torch.zeros(3, 5), bad, bad], backend=backend
            )
        assert d.calls == 0  # a list is there before the run; a function is asked at the stage where it is needed
        ask = [torch.zeros(3, 5), bad, bad].__getitem__
        with pytest.raises(error, match=f"^{message}"):
            fastode.sample(d, x_(), solver="ddim", eta=1.0, grid=GRID, noise=ask, backend=backend)
        assert d.calls <= 2


# -- what a call leaves behind -------------------------------------------------------------------------------------


@on_each
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_x_is_not_modified(backend, solver):
    for dtype in (torch.float32, torch.float64):
        x = x_(dtype=dtype)
        before = x.clone()
        samples = fastode.sample(Counted(), x, solver=solver, grid=GRID, backend=backend)
        samples.zero_()
        assert torch.equal(x, before)


@on_each
def test_dtypes_of_samples(backend):
    want = fastode.sample(Counted(), x_(), solver="unipc", grid=GRID, backend=backend)
    assert want.dtype == torch.float64
    # a state rounded to 11 or 8 bits once, at the start, on a problem that shrinks it a hundredfold
    for dtype, error in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        got = fastode.sample(Counted(), x_(dtype=dtype), solver="unipc", grid=GRID, backend=backend)
        assert got.dtype == torch.float32
        assert relative(got.double(), want) < error


@on_each
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_trajectories(backend, solver):
    """States of every level, the sigma of every network call in order, their number, and the samples themselves."""
    d = Counted()
    x = x_()
    call = {"solver": solver, "grid": GRID, "seeds": [1, 2, 3], "backend": backend}
    result = fastode.sample(d, x, return_trajectory=True, **call)
    assert isinstance(result, fastode.Result)
    assert result.nfe == d.calls == len(d.sigmas) == len(result.sigmas)
    assert result.sigmas.tolist() == pytest.approx(d.sigmas, rel=1e-12)
    assert len(result.states) == len(GRID)
    torch.testing.assert_close(result.states[0], x, rtol=1e-14, atol=0)
    assert torch.equal(result.states[-1], result.samples)
    plain = fastode.sample(Counted(), x, **call)
    torch.testing.assert_close(result.samples, plain, rtol=1e-12, atol=1e-12)  # kept states change the sums' grouping


@on_each
@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc", "dpm_solver_3"])
def test_callbacks_see_every_step_and_may_stop(backend, solver):
    x, d = x_(), Counted()
    seen = []

    def look(step, sigma, state, denoised):
        seen.append((step, sigma, state, denoised))  # kept as they are: later steps must not write into them

    fastode.sample(d, x, solver=solver, grid=GRID, backend=backend, callback=look)
    full = fastode.sample(d, x, solver=solver, grid=GRID, backend=backend, return_trajectory=True)
    assert [s[:2] for s in seen] == [(0, 80.0), (1, 9.0), (2, 1.0)]
    for (step, sigma, state, denoised), level in zip(seen, full.states, strict=False):
        if solver != "unipc" or step == 0:  # UniPC evaluates the prediction; the state is the correction made with it
            torch.testing.assert_close(state, level, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(denoised, state / (1 + sigma**2), rtol=1e-12, atol=1e-12)

    for last in range(3):
        d = Counted()
        stopped = fastode.sample(
            d,
            x,
            solver=solver,
            grid=GRID,
            backend=backend,
            callback=lambda step, *_, last=last: step == last,
            return_trajectory=True,
        )
        torch.testing.assert_close(stopped.samples, seen[last][2], rtol=1e-12, atol=1e-12)
        assert stopped.nfe == d.calls == len(stopped.sigmas)
        # the states that were reached: UniPC's at this level is not, until it has been corrected
        assert len(stopped.states) == (last + 1 if solver != "unipc" else max(last, 1))
        for state, level in zip(stopped.states, full.states, strict=False):
            torch.testing.assert_close(state, level, rtol=1e-12, atol=1e-12)
        stopped.samples.zero_()
        assert float(x.abs().max()) > 0


@on_each
def test_progress_is_shown(backend, capsys):
    fastode.sample(Counted(), x_(), solver="heun", grid=GRID, backend=backend, progress=True)
    shown = capsys.readouterr()
    assert "heun" in shown.err
    assert "6/6" in shown.err
    assert shown.out == ""


@on_each
def test_one_engine_serves_many_threads(backend):
    """Four threads share an engine; every result is bitwise the one of a serial call."""
    net = tiny_model.network()
    d = Denoiser(net, num_classes=3, null_label=3)
    engine = Engine(SOLVERS["unipc"](GRID), d, (2, 1, 8, 8), backend, guidance=True)
    calls = [({"seeds": [k, k + 100], "class_labels": [k % 3, 1]}, 1.0 + k) for k in range(16)]

    def run(k: int) -> torch.Tensor:
        return engine(**calls[k][0], guidance_scale=calls[k][1])

    with torch.no_grad():
        want = [run(k) for k in range(16)]
    got: dict[int, torch.Tensor] = {}
    failed: list[BaseException] = []
    ready = threading.Barrier(4)

    def work(first: int) -> None:
        try:
            ready.wait()
            with torch.no_grad():
                for k in range(first, 16, 4):
                    got[k] = run(k)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    for k in range(16):
        assert torch.equal(got[k], want[k])


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path):
    return tiny_model.write(tmp_path)


def test_models_load_by_path_and_by_name(tiny, monkeypatch):
    for name in (tiny, str(tiny), tiny.with_suffix("")):
        d = fastode.load(name)
        assert (d.name, d.num_classes, d.null_label, d.sample_shape) == ("tiny", 3, 3, (1, 8, 8))
        assert (d.schedule.sigma_min, d.schedule.sigma_max) == (0.002, 80.0)
        assert not d.network.training
    want = tiny_model.network().state_dict()
    for key, value in d.network.state_dict().items():
        assert torch.equal(value, want[key])
    monkeypatch.setattr(models, "WEIGHTS", tiny.parent)
    assert models.bundled() == ["tiny"]
    assert fastode.load("tiny").name == "tiny"
    with pytest.raises(
        FileNotFoundError, match=r"^model: no bundled model .*'tinny'; did you mean 'tiny'\? \(bundled: tiny\)"
    ):
        fastode.load("tinny")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_weights(tiny, share):
    whole = tiny.read_bytes()
    tiny.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"^weights: .* is damaged or not safetensors"):
        fastode.load(tiny)


def test_foreign_files_are_not_weights(tiny):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("weights were unpickled",))

    for content in (b"not weights", pickle.dumps(Trap()), b"\xff" * 100):
        tiny.write_bytes(content)
        with pytest.raises(ValueError, match=r"^weights: .* is damaged or not safetensors"):
            fastode.load(tiny)


def test_weights_that_do_not_fit_their_card(tiny):
    tensors = load_file(tiny)
    first = next(iter(tensors))
    changed = {
        "missing": {k: v for k, v in tensors.items() if k != first},
        "extra": {**tensors, "extra.weight": torch.zeros(3)},
        "shape": {**tensors, first: torch.zeros(3)},
        "empty": {},
    }
    for wrong in changed.values():
        save_file(wrong, tiny)
        with pytest.raises(ValueError, match=r"^weights: .* does not fit its card"):
            fastode.load(tiny)
    save_file({k: v.half() for k, v in tensors.items()}, tiny)  # stored narrow, used in the network's own dtype
    assert fastode.load(tiny).dtype == torch.float32


CARDS = {
    "no format": ({"format": None}, "model: .* is not a card of format 'fastode-denoiser-1'"),
    "another format": ({"format": "fastode-denoiser-9"}, "model: .* is not a card of format"),
    "no config": ({"config": None}, "weights: .* does not fit its card .*config"),
    "unknown field": ({"config": {"depth": 3}}, "weights: .* does not fit its card .*unet has no field 'depth'"),
    "another size": (
        {"config": {**tiny_model.CONFIG.to_dict(), "channels": [16, 16]}},
        "weights: .* does not fit its card",
    ),
    "bad size": ({"config": {**tiny_model.CONFIG.to_dict(), "resolution": 9}}, "weights: .* does not fit .*resolution"),
    "prediction": ({"prediction": "noise"}, "weights: .* does not fit its card .*prediction: must be one of"),
    "range": ({"sigma_min": 90.0}, "weights: .* does not fit its card .*sigma_min"),
    "type": ({"sigma_max": "big"}, "weights: .* does not fit its card"),
}


@pytest.mark.parametrize("name", CARDS)
def test_bad_cards(tmp_path, name):
    changes, message = CARDS[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        fastode.load(tiny_model.write(tmp_path, changes))


def test_damaged_cards(tiny):
    card = tiny.with_suffix(".json")
    whole = card.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff\xfe", b"[1, 2]"):
        card.write_bytes(content)
        with pytest.raises(ValueError, match=r"^model: .*tiny.json is not (valid JSON|a card)"):
            fastode.load(tiny)
    card.unlink()
    with pytest.raises(FileNotFoundError, match=r"^model: the card .* is missing beside the weights"):
        fastode.load(tiny)


def test_nothing_is_half_written(tmp_path, monkeypatch):
    """A write that fails leaves the old file and no fragment."""
    from fastode.evaluate.pictures import save_samples

    program = SOLVERS["heun"](GRID)
    target, picture, arrays = tmp_path / "p.safetensors", tmp_path / "a.png", tmp_path / "a.npz"
    samples = torch.zeros(2, 1, 8, 8)
    program.save(target)
    for path in (picture, arrays):
        save_samples(samples, path, seeds=[0, 1])
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        SOLVERS["ddim"](GRID).save(target)
    for path in (picture, arrays):
        with pytest.raises(OSError, match="No space left"):
            save_samples(samples + 0.5, path, seeds=[0, 1])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_models_without_classes(tmp_path):
    config = tiny_model.UNetConfig(**{**tiny_model.CONFIG.to_dict(), "num_classes": 0})
    d = fastode.load(tiny_model.write(tmp_path, config=config))
    assert fastode.sample(d, seeds=[0], solver="ddim", grid=GRID).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"^class_labels: tiny is not class-conditional"):
        fastode.sample(d, seeds=[0], solver="ddim", grid=GRID, class_labels=0)
    with pytest.raises(ValueError, match=r"^guidance_scale: guidance needs a condition"):
        fastode.sample(d, seeds=[0], solver="ddim", grid=GRID, guidance_scale=3.0)


def test_analytic_denoisers_follow_the_state():
    """float64 in, float64 out: no hidden float32."""
    data = Gaussian(torch.zeros(5), torch.full((5,), 0.25))
    x = x_()
    exact = data.flow(x, 80.0, 0.1)
    fine = fastode.sample(data, x, solver="dpm_solver_3", grid=torch.logspace(1.90309, -1, 200, dtype=torch.float64))
    # third order in h = ln(800)/200 = 0.033
    assert relative(fine, exact) < 1e-4
