"""Runtimes: the same samples as the eager network, from every executor; what was built is what is accepted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastode
from fastode import SOLVERS, Denoiser, runtimes
from fastode.runtimes import Portable, export_sampler, load_sampler
from fastode.runtimes.base import Card, MissingError, Source
from fastode.runtimes.tensorrt import EngineCache, TensorRT, TorchTensorRT, cache_key
from fastode.schedules import EDM, karras
from tests.conftest import make_grid, relative, start
from tests.tiny_model import network

SAME = 2e-5  # as in test_compile: the same sums in float32, grouped differently
onnx = pytest.mark.skipif(
    runtimes.onnx_missing() is not None, reason="ONNX is an optional extra: pip install 'fastode[onnx]'"
)


class Net(nn.Module):
    """A network of few operations, since exporters are slow, with a named output and labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.label = nn.Embedding(4, 3)
        self.inner, self.output = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, *, features: bool = False) -> Any:
        h = torch.tanh(self.inner(x) + c_noise.to(x.dtype)[:, None, None, None])
        if class_labels is not None:
            h = h + self.label(class_labels)[:, :, None, None]
        raw = self.output(h)
        return (raw, {"bottleneck": h.mean((2, 3))}) if features else raw


def denoiser(net: nn.Module | None = None) -> Denoiser:
    return Denoiser(net or Net().eval(), num_classes=3, null_label=3, sample_shape=(2, 4, 4), name="net")


CALL: dict[str, Any] = {"seeds": range(3), "class_labels": [0, 1, 2]}


def same(
    made: Denoiser, eager: Denoiser | None = None, bound: float = SAME, solvers: Sequence[str] = ("unipc", "heun")
) -> None:
    """Samples, guided ones, and named outputs."""
    eager = eager or denoiser()
    for solver in solvers:
        grid = karras(EDM(), 3)
        got, want = (fastode.sample(d, **CALL, solver=solver, grid=grid) for d in (made, eager))
        assert relative(got, want) < bound
    got, want = (fastode.sample(d, **CALL, solver="ddim", grid=grid, guidance_scale=2.0) for d in (made, eager))
    assert relative(got, want) < bound
    x, c, labels = torch.randn(3, 2, 4, 4), torch.randn(3), torch.tensor([0, 1, 3])
    raw, named = made.network(x, c, class_labels=labels, features=True)
    want_raw, want_named = eager.network(x.to(eager.dtype), c, class_labels=labels, features=True)
    assert relative(raw.float(), want_raw.float()) < bound and set(named) == {"bottleneck"}
    assert relative(named["bottleneck"].float(), want_named["bottleneck"].float()) < bound
    assert torch.equal(made.network(x, c), made.network(x, c, class_labels=torch.full((3,), 3)))  # "no class"


def test_eager_and_compiled() -> None:
    same(runtimes.build(denoiser(), "eager"))
    made = runtimes.build(denoiser(), "compile", batches=(6,), backend="eager")
    assert made.network.card.buckets == (6,) and max(made.network.card.error.values()) < SAME
    same(made)


def test_half_precision_says_how_far_it_is() -> None:
    """The card's error is what bfloat16 does to the network; samples stay within a few times that."""
    made = runtimes.build(denoiser(), "eager", dtype=torch.bfloat16)
    source = Source.of(denoiser(), "eager", (2,))
    error = source.measured(lambda bucket, inputs: made.network.run(bucket, [i.bfloat16() if i.is_floating_point()
                            and i.ndim > 1 else i for i in inputs]))["2"]  # fmt: skip
    assert 1e-3 < error < 3e-2  # 8 bits of mantissa, a few sums
    same(made, bound=10 * error, solvers=("ddim",))


@pytest.mark.slow
def test_inductor(tmp_path: Path) -> None:
    same(runtimes.build(denoiser(), "compile", batches=(6,)))


@pytest.mark.slow
def test_aoti(tmp_path: Path) -> None:
    made = runtimes.build(denoiser(), "aoti", path=tmp_path / "a", batches=(6,))
    assert made.network.card.error["6"] < SAME
    same(made)
    loaded = runtimes.load(tmp_path / "a")
    assert loaded.prediction == "edm" and loaded.null_label == 3 and loaded.schedule == EDM()
    same(loaded)
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    (tmp_path / "a" / "card.json").write_text(json.dumps({**card, "versions": {"torch": "1.0"}}))
    with pytest.raises(ValueError, match=r"compiled by torch 1\.0"):
        runtimes.load(tmp_path / "a")


@onnx
def test_onnx(tmp_path: Path) -> None:
    made = runtimes.build(denoiser(), "onnx", path=tmp_path / "o", batches=(6,))
    card = made.network.card
    assert card.error["6"] < SAME and card.outputs == ("raw", "bottleneck") and not card.capturable
    assert made.network.providers[-1] == "CPUExecutionProvider"
    same(made)
    loaded = runtimes.load(tmp_path / "o")
    same(loaded)
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["b6.onnx", "card.json"]
    x, c = torch.randn(7, 2, 4, 4), torch.randn(7)
    for match, call in {
        "batch: 7 samples.* built for 6": lambda: loaded.network(x, c),
        r"x: has shape \[2, 2, 5, 5\].*\[B, 2, 4, 4\]": lambda: loaded.network(torch.zeros(2, 2, 5, 5), c[:2]),
        "mask: this onnx network": lambda: loaded.network(x[:2], c[:2], mask=c),
        "providers: CUDAExecutionProvider is not": lambda: runtimes.load(
            tmp_path / "o", providers=["CUDAExecutionProvider"]
        ),
    }.items():
        with pytest.raises((ValueError, ImportError), match=match):
            call()
    (tmp_path / "o" / "b6.onnx").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be opened"):
        runtimes.load(tmp_path / "o")
    (tmp_path / "o" / "b6.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"b6\.onnx is missing"):
        runtimes.load(tmp_path / "o")


@onnx
def test_tensorrt_on_the_cpu_provider(tmp_path: Path) -> None:
    """The same session code and cache with another provider; without one it says what is missing."""
    made = runtimes.build(denoiser(), "tensorrt", path=tmp_path / "t", batches=(6,), providers=["CPUExecutionProvider"])
    same(made, solvers=("unipc",))
    assert len(list((tmp_path / "t" / "engines").iterdir())) == 1
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="tensorrt: no CUDA device"):
            TensorRT.build(denoiser(), tmp_path / "u")
        with pytest.raises(MissingError, match="torch_tensorrt: no CUDA device"):
            TorchTensorRT.build(denoiser(), cache=tmp_path)
        assert not (tmp_path / "u").exists()


def test_engine_cache(tmp_path: Path) -> None:
    """Keyed by weights, shape bucket, precision and versions; a folder that holds another key's engines is refused."""
    card = Source.of(denoiser(), "tensorrt", (2,)).card
    cache = EngineCache(tmp_path)
    keys = [
        cache_key(card, 2),
        cache_key(card, 4),
        cache_key(replace(card, dtype="float16"), 2),
        cache_key(replace(card, model="0"), 2),
        cache_key(replace(card, versions={"torch": "0"}), 2),
    ]
    folders = [cache.folder(key) for key in keys]
    assert len(set(folders)) == len(keys) and cache.folder(keys[0]) == folders[0]
    assert cache.stale(keys[:1]) == sorted(folders[1:])
    (folders[0] / "key.json").write_text((folders[3] / "key.json").read_text())
    with pytest.raises(ValueError, match="stale: it was built for model = '0'"):
        cache.folder(keys[0])
    (folders[1] / "key.json").unlink()
    with pytest.raises(ValueError, match=r"no readable key\.json"):
        cache.folder(keys[1])


# --- whole samplers ---


@pytest.mark.parametrize("name", SOLVERS)
def test_portable_sampler_of_every_solver(name: str) -> None:
    """Plain tensor operations with the table as constants: what is exported, against the engine."""
    net = denoiser()
    program = SOLVERS[name](make_grid("edm", 4))
    x, labels = start(program.grid, (3, 2, 4, 4), dtype=torch.float32), torch.tensor([0, 1, 2])
    got = Portable(program, net, names=["class_labels"])(x, labels)
    assert relative(got, fastode.Engine(program, net, x.shape)(x, class_labels=labels)) < SAME


def test_portable_guidance_and_noise() -> None:
    net, x, labels = denoiser(), torch.randn(3, 2, 4, 4) * 80, torch.tensor([0, 1, 2])
    program = SOLVERS["ddim"](karras(EDM(), 4), eta=1.0)
    noise = [torch.randn_like(x) for _ in range(program.draws)]
    names = ["class_labels", *(f"noise{k}" for k in range(program.draws))]
    got = Portable(program, net, names=names, guidance_scale=2.0)(x, labels, *noise)
    want = fastode.Engine(program, net, x.shape, guidance=True)(x, class_labels=labels, guidance_scale=2.0, noise=noise)
    assert relative(got, want) < SAME


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=onnx)])
def test_exported_sampler(suffix: str, tmp_path: Path) -> None:
    """One file for five steps: from seeds it gives the engine's samples, in a process that knows no model."""
    net, path = denoiser(), tmp_path / f"five{suffix}"
    grid = karras(EDM(), 3)
    program = SOLVERS["ddim"](grid, eta=0.5)
    export_sampler(path, program, net, batch=4)
    sampler = load_sampler(path)
    got = sampler(**CALL)
    assert relative(got, fastode.sample(net, **CALL, solver="ddim", eta=0.5, grid=grid)) < SAME
    assert sampler.card["nfe"] == 3 and sampler.card["solver"] == "ddim" and sampler.card["options"] == {"eta": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for match, call in {
        "x: give": lambda: sampler(),
        "x: this sampler takes up to 4": lambda: sampler(seeds=range(5)),
        "noise: this sampler makes 3 draws": lambda: sampler(torch.zeros(1, 2, 4, 4)),
        "mask: this sampler has no": lambda: sampler(seeds=[1], mask=torch.zeros(1)),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="path"):
        load_sampler(path)


# --- what cannot be ---


class Branches(nn.Module):
    """Looks at a number, which no exporter can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(2, 2, 1), inner

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        out: Tensor = self.inner(self.first(x))
        return out


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    net = Denoiser(Wrapped(Branches()), sample_shape=(2, 4, 4))
    with pytest.raises(ValueError, match=r"in inner \(Branches\)|in network\.inner \(Branches\)"):
        export_sampler(tmp_path / "a.pt2", SOLVERS["ddim"](karras(EDM(), 2)), net)
    assert not list(tmp_path.iterdir())


@onnx
def test_operations_without_onnx_are_named(tmp_path: Path) -> None:
    net = Denoiser(Wrapped(Odd()), sample_shape=(2, 4, 4))
    with pytest.raises(ValueError, match=r"no operation for .*bessel_j0, used in .*inner \(Odd\)"):
        runtimes.build(net, "onnx", path=tmp_path / "o")
    assert not list((tmp_path / "o").iterdir())


def test_bad_input(tmp_path: Path) -> None:
    net = denoiser()
    program = SOLVERS["ddim"](karras(EDM(), 2))
    for match, call in {
        "runtime: must be one of eager, compile": lambda: runtimes.build(net, "onx"),
        "batches: need": lambda: runtimes.build(net, "compile", batches=()),
        "mode: must be": lambda: runtimes.build(net, "compile", mode="fast"),
        "sample_shape must be known": lambda: runtimes.build(Denoiser(Net()), "eager"),
        "must be a torch module": lambda: runtimes.build(Denoiser(lambda x, c: x, sample_shape=(2,)), "eager"),
        "features: this network has no": lambda: runtimes.build(
            Denoiser(Wrapped(nn.Identity()), sample_shape=(2, 4, 4)), "eager", features=True
        ),
        r"path: must end in \.pt2 or \.onnx": lambda: export_sampler(tmp_path / "a.zip", program, net),
        "path: .* does not exist": lambda: load_sampler(tmp_path / "a.pt2"),
        "transforms": lambda: export_sampler(tmp_path / "a.pt2", program, fastode.denoisers.clipped(net)),
    }.items():
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=match):
            call()
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(ValueError, match="not a card"):
        Card.read(tmp_path / "card.json")


def test_the_networks_of_ours_keep_their_features() -> None:
    made = runtimes.build(Denoiser(network(), num_classes=3, null_label=3, sample_shape=(1, 8, 8)), "eager")
    assert made.network.card.outputs == ("raw", "bottleneck")
