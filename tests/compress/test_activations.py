"""Tests of activations on disk and their Hessians."""

from pathlib import Path

import pytest
import torch

from slimserve.compress.activations import ActivationFile, Hessian, JoinedActivations
from slimserve.core.errors import UserError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_file_reads_back_the_same_for_any_batch_size(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(7, 5, 3).to(dtype)
    file = ActivationFile(tmp_path / "x.bin", 7, 5, 3, dtype)
    for first in range(0, 7, 2):
        file.write(first, x[first : first + 2])
    assert torch.equal(torch.cat([file.read(first, 3) for first in range(0, 7, 3)]), x)
    file.write(4, -x[4:6])
    assert torch.equal(file.read(5, 1), -x[5:6])


def test_sequences_of_several_lengths_are_counted_through(tmp_path: Path) -> None:
    long, short = torch.randn(3, 5, 2), torch.randn(4, 2, 2)
    files = [
        ActivationFile(tmp_path / f"{len(x)}.bin", len(x), x.shape[1], x.shape[2], torch.float32) for x in (long, short)
    ]
    joined = JoinedActivations(files)
    for first, part in ((0, long), (3, short[:3]), (6, short[3:])):
        joined.write(first, part)
    assert joined.num_sequences == 7
    assert torch.equal(joined.read(1, 5), long[1:])
    assert torch.equal(joined.read(4, 2), short[1:3])
    with pytest.raises(IndexError):
        joined.read(7, 1)
    joined.delete()
    assert not list(tmp_path.iterdir())


def test_a_truncated_file_is_an_error_and_not_read_as_zeros(tmp_path: Path) -> None:
    file = ActivationFile(tmp_path / "x.bin", 3, 5, 2, torch.float32)
    file.write(0, torch.ones(2, 5, 2))
    with pytest.raises(UserError, match="truncated"):
        file.read(2, 1)


@pytest.mark.parametrize("width", [1, 37, 513, 1100])
def test_a_hessian_in_panels_equals_the_full_product(width: int) -> None:
    x = torch.randn(4, 9, width, generator=torch.Generator().manual_seed(width))
    hessian = Hessian(width, "layer")
    for part in x.split([1, 3]):
        hessian.add(part)
    flat = x.flatten(0, 1).double()
    mean = hessian.mean()
    torch.testing.assert_close(mean.double(), flat.T @ flat / 36, atol=1e-5, rtol=1e-5)
    assert torch.equal(mean, mean.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_not_finite_are_named_with_their_layer(value: float) -> None:
    x = torch.ones(1, 4, 3)
    x[0, 2, 1] = value
    with pytest.raises(UserError, match=r"input of block 3 mlp\.up_proj.*NaN or infinity"):
        hessian = Hessian(3, "block 3 mlp.up_proj")
        hessian.add(x)
        hessian.mean()
