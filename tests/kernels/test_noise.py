"""The random numbers: constants that must never change, statistics, and independence of how they are cut or computed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import noise

ROWS, COLUMNS = torch.arange(200), torch.arange(300)
NUMBERS = torch.tensor([0, 1, 2, 1000, 2**32, 2**32 + 1, 2**40 + 1, 2**62])
M32 = 2**32 - 1


def mask(rate: float = 0.5, site: int = 3, numbers: Tensor = NUMBERS, seed: int = 1) -> Tensor:
    """(B, 200, 300)"""
    return noise.keep_mask(noise.sample_keys(seed, numbers), site, ROWS, COLUMNS, rate)


def correlation(x: Tensor, y: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((x.flatten().double(), y.flatten().double())))[0, 1])


def assert_uncorrelated(x: Tensor, y: Tensor) -> None:
    """Within five standard errors of zero."""
    assert abs(correlation(x, y)) < 5 / math.sqrt(x.numel())


KEY = 410982486
SAMPLE_KEYS = [-1549830526, 105520578, -565159453, -1363793907, 352503312]
SPLIT_KEYS = [-907438432, 814160735, -972406160]
MASK = ["11110001110101111011001001101111", "11111001111000110111111100111011"]
NORMAL = [
    -0.5599212646484375,
    -0.207590252161026,
    -1.1589537858963013,
    0.19510726630687714,
    0.9634778499603271,
    1.444589376,
]


# -- the same for ever -----------------------------------------------------------------------------------------------


def test_keys_are_what_they_have_always_been() -> None:
    """A change of these changes every run's weights, order and masks: a resumed run would be another."""
    assert noise.key(1, "weight", "embedding.weight") == KEY
    assert noise.sample_keys(7, NUMBERS[:5]).tolist() == SAMPLE_KEYS
    assert noise.split_keys(noise.sample_keys(7, NUMBERS[:1]), 2, 3).tolist() == SPLIT_KEYS


def test_masks_are_what_they_have_always_been() -> None:
    kept = noise.keep_mask(noise.sample_keys(7, NUMBERS[:1]), 5, torch.arange(2), torch.arange(32), 0.3)[0]
    assert ["".join("01"[bit] for bit in row) for row in kept.tolist()] == MASK


def test_normal_numbers_are_what_they_have_always_been() -> None:
    values = noise.normal(noise.key(1, "weight", "x"), (2, 3), (0, 0), (2, 3))
    torch.testing.assert_close(values.flatten(), torch.tensor(NORMAL), rtol=1e-6, atol=0)


def test_masks_follow_the_published_hashes() -> None:
    """In Python's whole numbers: triple32 and lowbias32 of Wellons 2018, and how places enter."""
    keys = noise.sample_keys(3, torch.tensor([5, 9]))
    kept = noise.keep_mask(keys, 4, torch.arange(3, 9), torch.arange(7, 40), 0.25)
    for b, key in enumerate(keys.tolist()):
        site_key = triple32((key & M32) ^ (4 * 0x9E3779B9 & M32))
        for i, row in enumerate(range(3, 9)):
            row_key = triple32(site_key ^ row)
            signed = [(lowbias32(row_key ^ column * 2039) + 2**31) % 2**32 - 2**31 for column in range(7, 40)]
            assert kept[b, i].tolist() == [bits + 2**31 >= 2**32 // 4 for bits in signed]


def triple32(x: int) -> int:
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = (x ^ x >> shift) * factor & M32
    return x ^ x >> 14


def lowbias32(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ x >> shift) * factor & M32
    return x ^ x >> 16


# -- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9])
def test_a_mask_drops_at_its_rate(rate: float) -> None:
    kept = mask(rate)
    error = 5 * math.sqrt(rate * (1 - rate) / kept.numel())
    assert abs(1 - kept.double().mean().item() - rate) <= error
    for part in (kept.double().mean(dim=(0, 1)), kept.double().mean(dim=(0, 2)), kept.double().mean(dim=(1, 2))):
        spread = math.sqrt(rate * (1 - rate) * part.numel() / kept.numel())
        assert (1 - part - rate).abs().max() <= 5 * spread, "no row, column or sample is dropped more than another"


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 64, 128])
def test_neighbours_are_dropped_independently(lag: int) -> None:
    kept = mask()
    assert_uncorrelated(kept[:, lag:], kept[:, :-lag])
    assert_uncorrelated(kept[:, :, lag:], kept[:, :, :-lag])
    assert_uncorrelated(kept[:, lag:, lag:], kept[:, :-lag, :-lag])


def test_rows_columns_and_their_pairs_are_independent() -> None:
    """Every pair of rows, and of columns: correlations spread as those of coin throws do."""
    kept = mask(numbers=NUMBERS[:1])[0].double()
    for rows in (kept, kept.T):
        pairs = torch.corrcoef(rows)[*torch.triu_indices(len(rows), len(rows), 1)] * math.sqrt(rows.shape[1])
        assert abs(pairs.std().item() - 1) < 0.05
        assert pairs.abs().max() < 6


@pytest.mark.parametrize("other", [{"site": 4}, {"site": 11}, {"seed": 2}, {"numbers": NUMBERS + 1}])
def test_sites_seeds_and_samples_are_independent(other: dict[str, int]) -> None:
    assert_uncorrelated(mask(), mask(**other))


def test_no_two_sample_numbers_share_a_mask() -> None:
    """Beyond 2^32 as well, where a 32-bit number would begin again."""
    kept = mask().flatten(1).double()
    assert len(set(noise.sample_keys(1, NUMBERS).tolist())) == len(NUMBERS)
    between = torch.corrcoef(kept) - torch.eye(len(kept))
    assert between.abs().max() < 5 / math.sqrt(kept.shape[1])


def test_keys_of_many_samples_collide_as_rarely_as_random_ones() -> None:
    """2^16 of 2^32: half a collision is expected."""
    keys = noise.sample_keys(1, torch.arange(2**16) * 2**20 + 5)
    assert len(keys) - len(keys.unique()) <= 5
    heads = noise.split_keys(keys[: 2**11], 0, 32)
    assert len(heads) - len(heads.unique()) <= 5


def test_normal_numbers_are_normal() -> None:
    x = noise.normal(77, (500, 1000), (0, 0), (500, 1000)).double()
    count = x.numel()
    moments = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    for power, expected in moments.items():
        error = math.sqrt(math.prod(range(1, 2 * power, 2)) / count)  # E x^(2p) = (2p - 1)!!
        assert abs(x.pow(power).mean().item() - expected) < 5 * error
    ordered = x.flatten().sort().values
    places = torch.arange(1, count + 1, dtype=torch.float64) / count
    distance = (0.5 * (1 + torch.erf(ordered / math.sqrt(2))) - places).abs().max().item()
    assert distance < 1.95 / math.sqrt(count), "Kolmogorov-Smirnov at one in a thousand"
    for limit in (3.0, 4.0):
        expected = count * math.erfc(limit / math.sqrt(2))
        assert abs((x.abs() > limit).sum().item() - expected) < 5 * math.sqrt(expected)
    assert 4.2 < x.abs().max() < 6.5


def test_normal_numbers_are_independent() -> None:
    x = noise.normal(77, (300, 301), (0, 0), (300, 301))
    for lag in (1, 2, 7, 64):
        assert_uncorrelated(x[lag:], x[:-lag])
        assert_uncorrelated(x[:, lag:], x[:, :-lag])
        assert_uncorrelated(x[:, lag:].square(), x[:, :-lag].square())
    assert_uncorrelated(x, noise.normal(78, (300, 301), (0, 0), (300, 301)))


# -- the same however it is cut or computed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "size"), [((0, 0), (40, 30)), ((7, 0), (1, 30)), ((13, 5), (20, 11)), ((39, 29), (1, 1))]
)
def test_a_box_of_normal_numbers_is_the_slice_of_the_whole(offset: tuple[int, int], size: tuple[int, int]) -> None:
    whole = noise.normal(5, (40, 30), (0, 0), (40, 30))
    rows, columns = (slice(first, first + count) for first, count in zip(offset, size, strict=True))
    assert torch.equal(noise.normal(5, (40, 30), offset, size), whole[rows, columns])


def test_a_part_of_a_vector_of_normal_numbers_is_the_slice_of_the_whole() -> None:
    whole = noise.normal(5, (40,), (0,), (40,))
    assert whole.shape == (40,)
    assert torch.equal(noise.normal(5, (40,), (11,), (9,)), whole[11:20])


def test_dropout_of_a_slice_of_the_sequence_is_the_slice_of_the_whole() -> None:
    x, keys = torch.randn(3, 32, 20), noise.sample_keys(1, NUMBERS[:3])
    whole = noise.dropout(x, 0.4, keys, 6)
    for first in range(0, 32, 8):
        assert torch.equal(noise.dropout(x[:, first : first + 8], 0.4, keys, 6, first), whole[:, first : first + 8])
    assert torch.equal(noise.dropout(x[1:2], 0.4, keys[1:2], 6), whole[1:2])


def test_keys_of_a_share_of_the_heads_are_the_slice_of_the_whole() -> None:
    keys = noise.sample_keys(1, NUMBERS)
    whole = noise.split_keys(keys, 0, 12).view(-1, 12)
    assert torch.equal(noise.split_keys(keys, 4, 3).view(-1, 3), whole[:, 4:7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_scales_what_it_keeps_and_its_gradient_alike(dtype: torch.dtype) -> None:
    x = torch.randn(2, 50, 40).to(dtype).requires_grad_()
    keys = noise.sample_keys(1, NUMBERS[:2])
    out = noise.dropout(x, 0.2, keys, 6)
    kept = noise.keep_mask(keys, 6, torch.arange(50), torch.arange(40), 0.2)
    assert out.dtype == dtype
    torch.testing.assert_close(out, x * kept.to(dtype) / 0.8)
    torch.testing.assert_close(torch.autograd.grad(out.float().sum(), x)[0], (kept / 0.8).to(dtype))
    assert noise.dropout(x, 0.0, keys, 6) is x


@pytest.fixture
def without_vectors() -> Iterator[None]:
    """Compiled code as on a CPU without vector units: the scalar loops that elsewhere only the odd ends are."""
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        torch.compiler.reset()
        yield
    torch.compiler.reset()


@pytest.mark.thorough
def test_compiled_masks_are_the_eager_ones(without_vectors: None) -> None:
    """With vectors, and fused into what uses them: test_compiled_attention_is_the_eager_one."""

    def masks(keys: Tensor) -> Tensor:
        heads = noise.split_keys(keys, 2, 4)
        return noise.keep_mask(heads, 5, torch.arange(3, 30), torch.arange(37), 0.3)

    keys = noise.sample_keys(1, NUMBERS[:2])
    assert torch.equal(torch.compile(masks, dynamic=False, fullgraph=True)(keys), masks(keys))
