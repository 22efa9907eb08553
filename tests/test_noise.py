"""utils/noise.py: Philox's published answers, addresses, and that the numbers are as random as they look."""

import numpy as np
import pytest
import torch
from scipy import stats

from utils.noise import MASK, Purpose, normals, philox, uniforms, words

KNOWN = [  # Random123's kat_vectors: counter, key, answer
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert tuple(int(word) for word in philox(tuple(torch.tensor(c) for c in counter), key)) == answer


def test_matches_big_integer_arithmetic_at_every_field():
    def reference(counter, key):
        (c0, c1, c2, c3), (k0, k1) = counter, key
        for _ in range(10):
            p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
            k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
        return [c0, c1, c2, c3]

    seed, index, step, token = 2**64 - 3, 2**56 - 5, 2**32 - 7, 4095
    drawn = words(seed, Purpose.LABELS, index, step, token, count=12).tolist()
    for block in range(3):
        counter = block | token << 20, step, index & MASK, index >> 32 | int(Purpose.LABELS) << 24
        assert drawn[4 * block : 4 * block + 4] == reference(counter, (seed & MASK, seed >> 32))


@pytest.mark.parametrize("draw", [words, uniforms, normals])
def test_a_value_depends_on_its_address_alone(draw):
    index, step, token = torch.arange(40), torch.arange(6)[:, None, None], torch.arange(3)[:, None]
    block = draw(7, Purpose.SAMPLING, index, step, token, count=9)
    assert block.shape == (6, 3, 40, 9)
    assert torch.equal(draw(7, Purpose.SAMPLING, 31, 4, 2, count=5), block[4, 2, 31, :5])
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(7, Purpose.SAMPLING, index[shuffled], 4, 2, count=9), block[4, 2, shuffled])
    for other in [
        draw(8, Purpose.SAMPLING, 31, 4, 2, count=9),
        draw(7 + 2**32, Purpose.SAMPLING, 31, 4, 2, count=9),
        draw(7, Purpose.SAMPLING_NULL, 31, 4, 2, count=9),
        draw(7, Purpose.SAMPLING, 31 + 2**32, 4, 2, count=9),
        draw(7, Purpose.SAMPLING, 31, 5, 2, count=9),
        draw(7, Purpose.SAMPLING, 31, 4, 1, count=9),
    ]:
        assert not (other == block[4, 2, 31]).any()


@pytest.mark.parametrize(
    "name, value", [("seed", -1), ("seed", 2**64), ("step", 2**32), ("token", 4096), ("count", -1)]
)
def test_numbers_that_do_not_fit_are_refused(name, value):
    arguments = {"seed": 0, "purpose": Purpose.SAMPLING, "index": 0, "count": 4, name: value}
    with pytest.raises(ValueError, match=f"{name} "):
        words(**arguments)


def test_uniforms_lie_strictly_inside_the_interval(monkeypatch):
    for extreme, expected in [(0, 2.0**-24), (MASK, 1 - 2.0**-24)]:
        lanes = (torch.full((1, 1), extreme),) * 4
        monkeypatch.setattr("utils.noise.philox", lambda counter, key, lanes=lanes: lanes)
        assert uniforms(0, Purpose.SAMPLING, 0, count=4).unique().tolist() == [expected]
        assert normals(0, Purpose.SAMPLING, 0, count=4).isfinite().all()


def test_uniform_statistics():
    drawn = uniforms(0, Purpose.SAMPLING, torch.arange(2000), count=100).flatten().numpy()
    assert drawn.dtype == np.float32
    assert stats.kstest(drawn, "uniform").pvalue > 1e-3


def test_normal_statistics():
    drawn = normals(0, Purpose.SAMPLING, torch.arange(2000), count=100).flatten().numpy().astype(np.float64)
    root = len(drawn) ** 0.5  # standard errors of the k-th moment are sqrt(var(x^k) / n)
    for power, moment, deviation in [(1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)]:
        assert abs((drawn**power).mean() - moment) < 4 * deviation / root
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


@pytest.mark.parametrize("coordinate", ["seed", "purpose", "index", "step", "token", "value"])
def test_neighbours_along_every_coordinate_are_independent(coordinate):
    """Correlation of values and of squares, over 60,000 pairs that differ by one in a single coordinate."""
    address = {"seed": 3, "purpose": Purpose.FLOW_NOISE, "index": torch.arange(1500)[:, None], "token": 1, "step": 5}
    if coordinate == "value":
        drawn = normals(**address, count=41)
        first, second = drawn[..., :-1], drawn[..., 1:]
    else:
        moved = {**address, coordinate: address[coordinate] + 1}
        first, second = normals(**address, count=40), normals(**moved, count=40)
    first, second = first.flatten().double(), second.flatten().double()
    for power in (1, 2):
        correlation = torch.corrcoef(torch.stack((first**power, second**power)))[0, 1]
        assert abs(correlation) < 4.5 / len(first) ** 0.5


def test_none_may_be_asked_for():
    assert normals(0, Purpose.LABELS, torch.arange(3), count=0).shape == (3, 0)
