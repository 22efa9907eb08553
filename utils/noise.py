"""Random numbers addressed by what they are for: (seed, purpose, index, step, token) -> values.

Philox4x32-10 (Salmon et al. 2011), a counter-based generator: there is no state, so image i gets the same numbers
whatever the batch, the number of processes or the point of resumption. Integers are exact, hence the same on every
device and under torch.compile. Box-Muller runs in float64 and rounds to float32, because log, sin and cos of float32
differ in the last bit between devices and vector widths; after rounding about one value in 10^8 still may.

The 128-bit counter, lowest word first: block of four values (20 bits) and token (12) | step (32) | index (56) and
purpose (8). The key is the 64-bit seed.
"""

import math
from enum import IntEnum

import torch

MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32  # Philox's, less 2^32: their products with a word fit int64
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


class Purpose(IntEnum):
    """What a number is for: streams of different purposes never overlap. Values are for ever: they define results."""

    SAMPLING = 0  # index = image, token, step = sampler step (0: the start x)
    SAMPLING_NULL = 1  # the null row's own noise at token 0
    LABELS = 2  # index = image
    CLASS_DROPOUT = 3
    FLOW_TIME = 4
    FLOW_NOISE = 5
    POSTERIOR_NORMAL = 6
    POSTERIOR_UNIFORM = 7


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four int64 tensors of counter words in [0, 2^32), broadcast together, -> four tensors of random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) + c0, (p1 >> 32) + c2  # + c gives back the 2^32 taken off the multiplier
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & MASK, high0 ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


Address = int | torch.Tensor


def words(
    seed: int,
    purpose: Purpose,
    index: Address,
    step: Address = 0,
    token: Address = 0,
    *,
    count: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Random 32-bit words as int64, of shape broadcast(index, step, token) + (count,).

    index < 2^56, step < 2^32, token < 4096, 0 <= count <= 2^22; ints are checked, tensors (int64) are not. Value j does
    not depend on count. Raises ValueError for a number that does not fit its field.
    """
    limits = {"seed": (seed, 64), "purpose": (int(purpose), 8), "index": (index, 56), "step": (step, 32)}
    for name, (value, bits) in {**limits, "token": (token, 12), "count": (count - 1 if count else 0, 22)}.items():
        if isinstance(value, int) and not 0 <= value < 2**bits:
            raise ValueError(f"noise address: {name} {value} does not fit in {bits} bits; give 0 to {2**bits - 1}")
    index, step, token = (
        value.to(device)[..., None] if isinstance(value, torch.Tensor) else torch.full((1,), value, device=device)
        for value in (index, step, token)
    )
    blocks = torch.arange((count + 3) // 4, device=device)
    counter = blocks | token << 20, step, index & MASK, index >> 32 | int(purpose) << 24
    lanes = torch.broadcast_tensors(*philox(counter, (seed & MASK, seed >> 32)))
    return torch.stack(lanes, -1).flatten(-2)[..., :count]


def uniforms(
    seed: int,
    purpose: Purpose,
    index: Address,
    step: Address = 0,
    token: Address = 0,
    *,
    count: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Uniform float32 strictly inside (0, 1), multiples of 2^-24: exact on every device. Addressed as `words`."""
    drawn = words(seed, purpose, index, step, token, count=count, device=device)
    return ((drawn >> 9).to(torch.float32) + 0.5) * 2.0**-23


def normals(
    seed: int,
    purpose: Purpose,
    index: Address,
    step: Address = 0,
    token: Address = 0,
    *,
    count: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Standard normal float32 (Box-Muller, at most 6.8 from 0), two per pair of words. Addressed as `words`."""
    drawn = words(seed, purpose, index, step, token, count=count + count % 2, device=device)
    unit = (drawn.unflatten(-1, (-1, 2)).to(torch.float64) + 0.5) * 2.0**-32
    radius, angle = (-2 * unit[..., 0].log()).sqrt(), 2 * math.pi * unit[..., 1]
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return pairs.flatten(-2)[..., :count].to(torch.float32)
