"""Noise keyed by (seed, draw, element): the published generator, its statistics, and what it does not depend on."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import fastode
from fastode.backends import BACKENDS
from fastode.denoisers import Gaussian
from fastode.noise import check_seeds, normal, philox

CPU = torch.device("cpu")
NATIVE = ["native"] if BACKENDS["native"].missing(CPU) is None else []

KNOWN = {  # Random123's kat_vectors: counter, key, words
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def words(counter, key):
    made = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    return tuple(int(w) for w in made)


@pytest.mark.parametrize("name", KNOWN)
def test_philox_known_answers(name):
    counter, key, expected = KNOWN[name]
    assert words(counter, key) == expected


@given(
    counter=st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4),
    key=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_philox_in_int64_is_philox_in_unbounded_integers(counter, key):
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        (h0, l0), (h1, l1) = divmod(c0 * 0xD2511F53, 2**32), divmod(c2 * 0xCD9E8D57, 2**32)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    assert words(counter, key) == (c0, c1, c2, c3)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 + 5, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("draw", [0, 1, 41])
def test_numbers_are_box_muller_of_the_documented_blocks(seed, draw):
    """Element 4j .. 4j+3: counter (j, 0, draw, 0), key (seed mod 2^32, seed div 2^32) of 64-bit words."""
    got = normal([seed], draw, (11,), dtype=torch.float64)[0].tolist()
    want = []
    for j in range(3):
        r = [float(numpy.float32(w)) for w in words((j, 0, draw, 0), (seed % 2**32, seed % 2**64 // 2**32))]
        for a, b in ((r[0], r[1]), (r[2], r[3])):
            # the documented rounding: r + 1 in float32, so u1 and u2 are the same numbers on every backend
            u1, u2 = float(numpy.float32(a + 1)) * 2.0**-32, b * 2.0**-32
            want += [math.sqrt(-2 * math.log(u1)) * f(2 * math.pi * u2) for f in (math.cos, math.sin)]
    # sines of angles up to 2 pi lose 1e-15 near their zeros; the logarithm of a number near 1 as much
    assert got == pytest.approx(want[:11], rel=1e-12, abs=1e-14)


def test_moments_and_distribution():
    """400 000 numbers of four seeds. The seeds are fixed: what passes once always passes; the bounds are 4 s.e."""
    z = normal(range(4), 0, (100_000,), dtype=torch.float64).numpy().ravel()
    n = len(z)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # E z^k and its variance per number
    for k, (mean, variance) in moments.items():
        assert abs((z**k).mean() - mean) < 4 * math.sqrt(variance / n), k
    assert stats.kstest(z, "norm").pvalue > 1e-3
    # Tails: counts beyond 3 and 4 standard deviations are Poisson.
    for bound in (3, 4):
        expected = n * 2 * stats.norm.sf(bound)
        assert abs((abs(z) > bound).sum() - expected) < 4 * math.sqrt(expected)
    assert abs(z).max() < math.sqrt(2 * 32 * math.log(2)) + 1e-6  # the smallest u1 is 2^-32


def test_neighbours_are_independent():
    """Seeds, draws and elements next to each other, and the two words of a seed: correlations within 5 s.e."""
    n = 40_000
    a = normal([0, 1, 2**32, -1], 0, (n,), dtype=torch.float64)
    b = normal([0, 1, 2**32, -1], 1, (n,), dtype=torch.float64)
    rows = [*a, *b, *(torch.roll(a[0], k) for k in (1, 2, 3, 4, 5))]
    correlations = numpy.corrcoef(torch.stack(rows).numpy())
    numpy.fill_diagonal(correlations, 0)
    assert abs(correlations).max() < 5 / math.sqrt(n)
    squares = numpy.corrcoef((torch.stack(rows) ** 2).numpy())  # Box-Muller pairs share a radius: it must not show
    numpy.fill_diagonal(squares, 0)
    assert abs(squares).max() < 5 / math.sqrt(n)
    assert not bool((a[0] == a[1]).any())


seeds_ = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(seeds_, min_size=1, max_size=5), st.integers(0, 2**31), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_number_depends_on_seed_draw_and_element_only(seeds, draw, count):
    """Bitwise: not on the batch, the position in it, the shape, or how many numbers are made."""
    together = normal(seeds, draw, (count,))
    backwards = normal(seeds[::-1], draw, (count,)).flip(0)
    longer = normal(seeds, draw, (4, 13))
    assert torch.equal(together, backwards)
    assert torch.equal(together, longer.flatten(1)[:, :count])
    for i, seed in enumerate(seeds):
        assert torch.equal(normal([seed], draw, (count,))[0], together[i])
    assert torch.equal(normal(torch.tensor(seeds), draw, (count,)), together)


def test_dtypes_are_roundings_of_one_number():
    wide = normal([3], 2, (50,), dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(normal([3], 2, (50,), dtype=dtype), wide.to(dtype))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 5), (3, 32, 32)])
def test_backends_make_the_same_numbers(name, dtype, shape):
    seeds = check_seeds([0, 5, -1, 2**63 - 1])
    made = BACKENDS[name].normal(seeds, 3, shape, dtype)
    want = normal(seeds, 3, shape, dtype=torch.float64)
    # float32: the last bits of logarithm and sine, on numbers up to 6.7
    torch.testing.assert_close(made.double(), want, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13)


def test_engines_start_at_draw_zero_and_go_on_from_one():
    """engine(seeds) is sigma_0 times draw 0; draw k of a stochastic program is draw k + 1."""
    data = Gaussian(torch.zeros(6), 0.25)
    program = fastode.SOLVERS["ddim"]([10.0, 3.0, 0.5, 0.0], eta=1.0)
    seeds = [4, -9, 2**40]
    for backend in ("reference", "torch", *NATIVE):
        engine = fastode.Engine(program, data, (3, 6), backend, dtype=torch.float64)
        x = 10 * normal(seeds, 0, (6,), dtype=torch.float64)
        draws = [normal(seeds, k + 1, (6,), dtype=torch.float64) for k in range(program.draws)]
        by_hand = engine(x, noise=draws)
        # the native backend makes the start and the draws itself, to rounding
        torch.testing.assert_close(engine(seeds=seeds), by_hand, rtol=0, atol=1e-12)
        torch.testing.assert_close(engine(x, seeds=seeds), by_hand, rtol=0, atol=1e-12)
        assert torch.equal(engine(x, noise=draws.__getitem__), by_hand)
        torch.manual_seed(1)
        first = engine(x)
        assert not torch.equal(first, engine(x))  # without seeds the noise follows torch's generator
        torch.manual_seed(1)
        assert torch.equal(first, engine(x))


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "seeds: need at least one"),
        ([1.5], "seeds: must be whole numbers"),
        (["a"], "seeds: must be whole numbers"),
        ([True, False], "seeds: must be whole numbers"),
        ([2**63], "seeds: must fit in 64 signed bits"),
        ([-(2**63) - 1], "seeds: must fit in 64 signed bits"),
        (torch.tensor([1.0]), "seeds: must be a sequence of whole numbers, got torch.float32"),
        (torch.tensor([True]), "seeds: must be a sequence of whole numbers"),
        (torch.tensor(3), r"seeds: must be a sequence of whole numbers, got torch.int64 of shape \[\]"),
        (torch.tensor([[3]]), "seeds: must be a sequence of whole numbers"),
    ],
)
def test_seeds_are_whole_numbers(seeds, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_seeds(seeds)


def test_seeds_of_every_integer_kind():
    want = torch.tensor([1, 2], dtype=torch.int64)
    given_ = [range(1, 3), (1, 2), numpy.array([1, 2], dtype=numpy.int32), torch.tensor([1, 2], dtype=torch.uint8)]
    for seeds in (*given_, [numpy.int64(1), 2]):
        assert torch.equal(check_seeds(seeds), want)
    with pytest.raises(ValueError, match=r"^seeds: need one per sample \(3\), got 2"):
        check_seeds([1, 2], 3)
