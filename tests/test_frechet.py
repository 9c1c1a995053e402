"""Distances between sets of features: against closed forms, scipy, torch-fidelity, clean-fid, and plain loops."""

import importlib.abc
import importlib.machinery
import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor

from fastode.evaluate.data import Reference, load_reference
from fastode.evaluate.features import extractor
from fastode.evaluate.frechet import Statistics, floor, frechet_distance, jackknife, too_few
from fastode.evaluate.manifold import MEASURES, Manifold
from fastode.files import write_tensors
from fastode.nets.inception import Inception, load_inception, resize_tf1

scipy_linalg = pytest.importorskip("scipy.linalg")


def features(n: int, f: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, f, generator=g, dtype=torch.float64) @ torch.randn(f, f, generator=g, dtype=torch.float64)


def textbook(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrtm(S1 S2)) by scipy's matrix square root."""
    root = scipy_linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy())
    shift = (a.mean - b.mean).numpy()
    return float(shift @ shift + np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root.real))


# -- Frechet distance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "f"), [(400, 3), (1000, 64), (90, 64)])
def test_equals_scipy(n, f):
    a, b = Statistics.of(features(n, f, 1)), Statistics.of(features(n + 50, f, 2) + 0.3)
    # sqrtm of a product of condition 1e8 and more loses half of float64's digits; ours does not
    assert frechet_distance(a, b) == pytest.approx(textbook(a, b), rel=1e-6)


def test_closed_form_of_gaussians():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2; and in one dimension."""
    s1, s2 = torch.tensor([0.5, 2.0, 3.0]).double(), torch.tensor([1.5, 0.1, 3.0]).double()
    q = torch.linalg.qr(features(3, 3))[0]
    m1, m2 = torch.tensor([1.0, 0, -2]).double(), torch.tensor([0.5, 1, -2]).double()
    a, b = (Statistics(m, q @ torch.diag(s**2) @ q.T) for m, s in ((m1, s1), (m2, s2)))
    assert frechet_distance(a, b) == pytest.approx(1.25 + float((s1 - s2).square().sum()), rel=1e-12)
    one, two = (Statistics(torch.tensor([m]).double(), torch.tensor([[s**2]]).double()) for m, s in ((0, 1), (3, 2)))
    assert frechet_distance(one, two) == pytest.approx(9 + 1, rel=1e-12)


def test_a_set_has_no_distance_to_itself_even_where_singular():
    few = Statistics.of(features(5, 40))
    assert abs(frechet_distance(few, few)) < 1e-9 * float(few.covariance.trace())  # roots of rounded zeros
    assert frechet_distance(few, Statistics(few.mean + 1, few.covariance)) == pytest.approx(40, rel=1e-8)


def test_sums_do_not_cancel():
    """Features that are large beside their spread, in float32 as networks give them."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 1e4
    want = np.cov(x.double().numpy().T)
    np.testing.assert_allclose(Statistics.of(x).covariance.numpy(), want, rtol=1e-10)


def test_floor_is_what_perfect_samples_get():
    """One feature of variance 1: E d = 1/N + E (s - 1)^2, to first order 1/N + 1/(2N)."""
    reference = Statistics(torch.zeros(1).double(), torch.ones(1, 1).double())
    n, repeats = 50, 4000
    found = floor(reference, n, repeats=repeats)
    # the standard error of the mean of d: its standard deviation is about sqrt(2) * 1.5 / N
    assert found == pytest.approx(1.5 / n, abs=4 * 2.2 / n / math.sqrt(repeats))
    assert "biased" in str(too_few(30, Statistics.of(features(100, 40)))) and too_few(50, reference) is None


def test_jackknife_of_a_mean_is_the_standard_error():
    blocks = torch.tensor([1.0, 4.0, 2.0, 7.0]).double()
    left_out = [(blocks.sum() - b) / 3 for b in blocks]
    assert jackknife(left_out) == pytest.approx(float(blocks.std() / 2), rel=1e-12)
    assert math.isnan(jackknife([1.0]))


# -- peers -----------------------------------------------------------------------------------------------------------


class _Anything(type):
    """A class for every name: enough to import what is never called."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torch-fidelity and clean-fid import torchvision for reading pictures, which is not what is compared."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "requests"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


@pytest.fixture
def peer(monkeypatch):
    """Imports a peer, with a stand-in for what it needs and is not installed."""

    def load(name: str):
        monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, _StandIn()])
        before = set(sys.modules)
        try:
            return pytest.importorskip(name, exc_type=ImportError)
        finally:
            for made in set(sys.modules) - before:
                if made.split(".")[0] in ("torchvision", "requests"):
                    monkeypatch.delitem(sys.modules, made)

    return load


def test_equals_torch_fidelity(peer):
    fid = peer("torch_fidelity.metric_fid")
    a, b = features(700, 48, 3), features(600, 48, 4) + 0.1
    one, two = ({"mu": x.mean(0).numpy(), "sigma": np.cov(x.numpy().T)} for x in (a, b))
    want = fid.fid_statistics_to_metric(one, two, False)[fid.KEY_METRIC_FID]
    assert frechet_distance(Statistics.of(a), Statistics.of(b)) == pytest.approx(want, rel=1e-6)


def test_equals_clean_fid(peer):
    fid = peer("cleanfid.fid")
    a, b = Statistics.of(features(700, 48, 3)), Statistics.of(features(600, 48, 4) + 0.1)
    want = fid.frechet_distance(*(t.numpy() for s in (a, b) for t in (s.mean, s.covariance)))
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """An Inception with random weights of the right size for activations of order 1."""
    torch.manual_seed(0)
    net = Inception()
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif value.ndim == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("inception") / "w.safetensors"
    write_tensors(path, dict(net.state_dict()))
    torch.save(net.state_dict(), path.with_suffix(".pth"))
    return path


def test_inception_is_that_of_torch_fidelity(peer, weights):
    """Same file, same pictures, same features: the net, the resizing and the rounding to 8 bits."""
    net = peer("torch_fidelity.feature_extractor_inceptionv3")
    theirs = net.FeatureExtractorInceptionV3(
        "x", ["2048"], feature_extractor_weights_path=str(weights.with_suffix(".pth"))
    )
    x = torch.rand(2, 3, 32, 40) * 2.2 - 1.1
    want = theirs(((x + 1) * 127.5).round().clamp(0, 255).byte())[0]
    made = extractor(f"inception:{weights}")(x)
    assert made.shape == (2, 2048)
    # float32 through 94 layers; the peer groups the resizing otherwise
    assert float((made - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_inception_loads_pth_and_refuses_other_nets(weights, tmp_path):
    assert torch.equal(load_inception(weights.with_suffix(".pth")).fc.weight, load_inception(weights).fc.weight)
    other = {k: v for k, v in load_inception(weights).state_dict().items() if not k.startswith("Mixed_7c")}
    write_tensors(tmp_path / "a.safetensors", other)
    with pytest.raises(ValueError, match=r"features: .*lacks Mixed_7c"):
        load_inception(tmp_path / "a.safetensors")
    write_tensors(
        tmp_path / "b.safetensors", {**load_inception(weights).state_dict(), "fc.weight": torch.ones(1000, 2048)}
    )
    with pytest.raises(ValueError, match=r"fc.weight has shape \[1000, 2048\] instead of \[1008, 2048\]"):
        load_inception(tmp_path / "b.safetensors")
    (tmp_path / "c.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"features: .*c\.pth"):
        load_inception(tmp_path / "c.pth")
    with pytest.raises(FileNotFoundError, match="features"):
        load_inception(tmp_path / "d.pth")


def test_resizing_is_that_of_tensorflow_1():
    """Output i reads i n / side: the first pixels coincide, and doubling puts means between."""
    x = torch.tensor([0.0, 1.0, 4.0, 9.0]).expand(1, 1, 4, 4)
    row = resize_tf1(x, 8)[0, 0, 0]
    assert row.tolist() == [0, 0.5, 1, 2.5, 4, 6.5, 9, 9]


# -- precision, recall, density, coverage ----------------------------------------------------------------------------


def by_loops(real: np.ndarray, fake: np.ndarray, k: int, wide: int) -> dict[str, float]:
    """The definitions of arXiv:1904.06991 and arXiv:2002.09797, one distance at a time."""

    def distance(a, b):
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))

    def radius(points, i, k):
        return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]

    precision = np.mean([any(distance(f, real[j]) <= radius(real, j, k) for j in range(len(real))) for f in fake])
    recall = np.mean([any(distance(r, fake[j]) <= radius(fake, j, k) for j in range(len(fake))) for r in real])
    inside = np.array([[distance(f, real[j]) <= radius(real, j, wide) for j in range(len(real))] for f in fake])
    return {
        "precision": float(precision),
        "recall": float(recall),
        "density": float(inside.sum() / wide / len(fake)),
        "coverage": float(inside.any(0).mean()),
    }


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.7, 0.5), (4.0, 1.0), (0.0, 3.0)])
def test_manifolds_agree_with_plain_loops(shift, scale):
    g = torch.Generator().manual_seed(5)
    real, fake = torch.randn(30, 3, generator=g), torch.randn(25, 3, generator=g) * scale + shift
    found = Manifold.of(real).measure(fake)
    want = by_loops(real.double().numpy(), fake.double().numpy(), 3, 5)
    assert found == pytest.approx(want, abs=1e-12)  # shares of whole numbers
    if shift == 4:
        assert found["precision"] == 0


def test_manifolds_of_known_sets():
    line = torch.arange(20.0)[:, None]
    same = Manifold.of(line).measure(line)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    collapsed = Manifold.of(line).measure(torch.full((20, 1), 9.5))
    assert (collapsed["precision"], collapsed["recall"]) == (1, 0)


def test_errors_of_manifolds_leave_out_whole_blocks():
    g = torch.Generator().manual_seed(6)
    real, fake = torch.randn(40, 3, generator=g), torch.randn(36, 3, generator=g)
    manifold = Manifold.of(real)
    found = manifold.measure(fake, blocks=[12, 12, 12])
    for name in MEASURES:
        parts = [manifold.measure(torch.cat([fake[:i], fake[i + 12 :]]))[name] for i in (0, 12, 24)]
        assert found[f"{name}_se"] == pytest.approx(jackknife(parts), abs=1e-12)


def test_bad_features():
    with pytest.raises(ValueError, match=r"features: need \[N, F\] with N of at least 2"):
        Statistics.of(torch.ones(1, 3))
    with pytest.raises(ValueError, match="both sets need the same extractor"):
        frechet_distance(Statistics.of(features(9, 3)), Statistics.of(features(9, 4)))
    with pytest.raises(ValueError, match="more than 5 points"):
        Manifold.of(torch.ones(5, 2))


# -- extractors and references -----------------------------------------------------------------------------------------


def mean_of_halves(x: Tensor) -> Tensor:
    return torch.stack([x[:, :, :, :4].mean((1, 2, 3)), x[:, :, :, 4:].mean((1, 2, 3))], 1)


def wrong_shape(x: Tensor) -> Tensor:
    return x.mean()


def test_extractors():
    x = torch.rand(3, 1, 32, 32)
    digits = extractor("mnist")
    assert digits(x).shape == (3, 128) and digits.read(digits(x)).shape == (3,)
    assert extractor("pixels")(x).shape == (3, 1024)
    assert extractor(f"{__name__}:mean_of_halves")(torch.rand(3, 1, 8, 8)).shape == (3, 2)
    with pytest.raises(ValueError, match=r"features: mnist takes pictures of shape \[1, 32, 32\], got \[3, 8, 8\]"):
        digits(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must return \[2, F\]"):
        extractor(f"{__name__}:wrong_shape")(torch.rand(2, 1, 8, 8))
    for name in ("imagenet", "no_such_module:f", f"{__name__}:nothing"):
        with pytest.raises(ValueError, match="features: "):
            extractor(name)
    with pytest.raises(FileNotFoundError, match="features"):
        extractor("no.safetensors")


def test_references(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTODE_CACHE", str(tmp_path / "cache"))
    images = np.random.default_rng(0).integers(0, 255, (30, 6, 6), dtype=np.uint8)
    np.savez(tmp_path / "i.npz", images=images)
    pixels = extractor("pixels")
    with pytest.raises(
        ValueError, match=r"reference: images of .*i.npz have shape \[1, 6, 6\], the model makes \[1, 8, 8\]; --fit"
    ):
        load_reference(str(tmp_path / "i.npz"), pixels, (1, 8, 8))
    with pytest.raises(ValueError, match=r"have shape \[1, 6, 6\], the model makes \[3, 6, 6\]$"):
        load_reference(str(tmp_path / "i.npz"), pixels, (3, 6, 6))
    made = load_reference(str(tmp_path / "i.npz"), pixels, (1, 6, 6))
    want = images.reshape(30, 36) / 127.5 - 1
    np.testing.assert_allclose(made.statistics.covariance.numpy(), np.cov(want.T), atol=1e-6)  # pixels in float32
    monkeypatch.setattr(type(pixels), "__call__", lambda *_: pytest.fail("features of the reference are made once"))
    again = load_reference(str(tmp_path / "i.npz"), pixels, (1, 6, 6))
    assert again.digest == made.digest and torch.equal(again.features, made.features)
    made.statistics.save(tmp_path / "s.npz")
    stats = load_reference(str(tmp_path / "s.npz"), pixels, (1, 6, 6))
    assert stats.features is None and torch.equal(stats.statistics.covariance, made.statistics.covariance)
    Reference("r", made.statistics, made.features, "").save(tmp_path / "r.safetensors", count=9)
    assert len(load_reference(str(tmp_path / "r.safetensors"), pixels).features) == 9
    np.savez(tmp_path / "bad.npz", mu=np.ones(3), sigma=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"reference: .*bad.npz holds no feature statistics"):
        load_reference(str(tmp_path / "bad.npz"), pixels)
    with pytest.raises(FileNotFoundError, match="give images, statistics, bundled or none"):
        load_reference("nowhere", pixels)
    with pytest.raises(ValueError, match="none is bundled for features 'pixels'"):
        load_reference("bundled", pixels)


def test_the_bundled_reference():
    made = load_reference("bundled", extractor("mnist"))
    assert (made.statistics.count, made.statistics.dimension, made.features.shape) == (60000, 128, (2000, 128))
    # 2,000 real digits against all 60,000: what a perfect model would get. The floor assumes Gaussian features.
    found = frechet_distance(Statistics.of(made.features), made.statistics)
    assert found == pytest.approx(floor(made.statistics, 2000), rel=0.25)
