"""The one judgement of numbers: as close to float64 truth as eager PyTorch is, and no constants.

An error is scale-free: the largest one over the largest true value, and the RMS one over the RMS
of the true values. The largest catches a single wrong row, the RMS a diffuse loss of precision.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FACTOR = 2.0  # times the error of eager PyTorch; design section 5


def assert_matches(
    actual: Tensor, truth: Tensor, eager: Tensor, name: str = "result", *, per_row: bool = False
) -> None:
    """Raises unless `actual` is as near to `truth` (float64) as `eager` is, up to the factor.

    For both errors: `err(actual) <= 2 err(eager) + eps / 2`. Infinities and NaNs must be where
    the truth, rounded to the dtype, has them. `per_row` judges each row of the last dimension by
    itself, which is how values of very different size are held to their own scale.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}, not float64"
    assert actual.dtype == eager.dtype, f"{name} is {actual.dtype}, eager PyTorch {eager.dtype}"
    assert actual.shape == truth.shape == eager.shape, (
        f"{name} is {tuple(actual.shape)}, the truth {tuple(truth.shape)}, "
        f"eager {tuple(eager.shape)}"
    )
    if actual.numel() == 0:
        return
    actual, truth, eager = (t.detach().cpu() for t in (actual, truth, eager))
    assert_same_special_values(actual, truth, name)
    if not per_row:
        actual, truth, eager = (t.reshape(1, -1) for t in (actual, truth, eager))
    rounded = truth.to(actual.dtype)
    finite = rounded.isfinite()
    bound_of = _errors(eager, truth, finite & eager.isfinite())
    unit = torch.finfo(actual.dtype).eps / 2
    for kind, error, of_eager in zip(
        ("largest", "RMS"), _errors(actual, truth, finite), bound_of, strict=True
    ):
        bad = ~(error <= FACTOR * of_eager + unit)
        if bad.any():
            row = int(bad.reshape(-1).nonzero()[0])
            _fail(actual, truth, finite, name, kind, row, error, of_eager, unit)


def at_least_a_unit(eager: Tensor, truth: Tensor) -> Tensor:
    """`eager`, but never nearer to the truth than a unit from each of two elementary functions.

    On a row of a few points eager PyTorch is now and then exact by luck, which no library of
    elementary functions promises.
    """
    unit = truth * (1.0 + 2.0 * torch.finfo(eager.dtype).eps)
    far = (eager.double() - truth).abs() > (unit - truth).abs()
    return torch.where(far, eager, unit.to(eager.dtype))


def with_what_vanishes(actual: Tensor, truth: Tensor) -> Tensor:
    """`actual`, with the truth where it is 0 for what may be lost: an exponential that is smaller
    than the normal numbers of float32, times numbers of some hundreds.
    """
    lost = (actual == 0) & (truth.abs() < 512 * torch.finfo(torch.float32).smallest_normal)
    return actual.where(~lost, truth.to(actual.dtype))


def _errors(value: Tensor, truth: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the RMS error of each row, relative to the norm of the truth there."""
    true = truth.where(where, 0.0)
    off = (value.double() - truth).where(where, 0.0)
    return _over(off.abs().amax(-1), true.abs().amax(-1)), _over(_rms(off), _rms(true))


def _rms(x: Tensor) -> Tensor:
    # Scaled first: the squares of large float64 numbers overflow.
    largest = x.abs().amax(-1, keepdim=True)
    scaled = x / largest.where(largest > 0, 1.0)
    return largest.squeeze(-1) * scaled.square().mean(-1).sqrt()


def _over(error: Tensor, norm: Tensor) -> Tensor:
    """`error / norm`; where all true values are 0, any error at all is infinitely large."""
    return torch.where(error == 0, 0.0, error / norm)


def assert_same_special_values(actual: Tensor, truth: Tensor, name: str = "result") -> None:
    """Raises unless infinities and NaNs are where the truth, rounded to the dtype, has them."""
    expected = truth.to(actual.dtype)
    same = torch.where(
        expected.isnan(),
        actual.isnan(),
        torch.where(expected.isinf(), actual == expected, actual.isfinite()),
    )
    if not same.all():
        place = tuple((~same).nonzero()[0].tolist())
        raise AssertionError(
            f"{name} is {actual[place].item()} at {place}, the truth is {truth[place].item()}: "
            f"infinities and NaNs are at {int((~same).sum())} wrong places"
        )


def _fail(
    actual: Tensor,
    truth: Tensor,
    finite: Tensor,
    name: str,
    kind: str,
    row: int,
    error: Tensor,
    of_eager: Tensor,
    unit: float,
) -> None:
    rows = [t.reshape(-1, t.shape[-1])[row] for t in (actual, truth, finite)]
    off = (rows[0].double() - rows[1]).where(rows[2], 0.0).abs()
    place = int(off.argmax())
    raise AssertionError(
        f"{name}: the {kind} error is {error.reshape(-1)[row]:.3g}, that of eager PyTorch "
        f"{of_eager.reshape(-1)[row]:.3g}, one half unit {unit:.3g}. Worst at row {row}, flat "
        f"index {place}: {rows[0][place].item()!r} in place of {rows[1][place].item()!r}"
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Raises if one of the tensors has other bits at the end than at the start."""
    before = [tensor.detach().clone() for tensor in tensors]
    yield
    for index, (old, new) in enumerate(zip(before, tensors, strict=True)):
        assert same_bits(old, new), f"tensor {index} was overwritten"
