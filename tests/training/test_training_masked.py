"""Statistics of marked entries against the same by boolean indexing."""

import math

import pytest
import torch

from openmm_bg.training.masked import masked_mean, masked_median, masked_std


@pytest.mark.parametrize("n", [1, 2, 7, 100])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_they_are_those_of_the_marked_entries(n, share):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, generator=generator) < share
    mask[0] = True
    x = torch.where(mask, x, torch.tensor([math.nan, math.inf, -math.inf])[torch.arange(n) % 3])
    assert torch.allclose(masked_mean(x, mask), x[mask].mean())
    assert masked_median(x, mask) == x[mask].median()
    if mask.sum() > 1:
        assert torch.allclose(masked_std(x, mask), x[mask].std())
    else:
        assert masked_std(x, mask).isnan()


def test_nothing_marked_is_no_number():
    x, mask = torch.ones(3), torch.zeros(3, dtype=torch.bool)
    assert all(f(x, mask).isnan() for f in (masked_mean, masked_median, masked_std))


def test_gradients_of_the_unmarked_are_zero():
    x = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    masked_mean(x, torch.tensor([True, False, True])).backward()
    assert x.grad.tolist() == [0.5, 0.0, 0.5]
