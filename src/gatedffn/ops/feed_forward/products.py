"""Matrix products by libraries and by own kernels, all with the same call."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gatedffn.errors import ShapeError
from gatedffn.ops import kernels
from gatedffn.ops.kernels import scratch

# product(a, b, out, add): a[m, k] @ b[k, n] into `out`, of any row stride, or into new memory;
# with `add` it is added to what `out` holds.
Product = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


def by_torch(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """PyTorch's default: MKL or whichever BLAS it was built with, oneDNN for bfloat16."""
    a = closed_up(a)
    if out is None:
        return torch.mm(a, b)
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def closed_up(x: Tensor) -> Tensor:
    """`x`, copied where PyTorch's product with it on its left would read beyond its rows: by tiles
    of 16-bit numbers, 32 of them at a time. What lies there is multiplied by 0, which leaves a NaN.
    """
    if x.layout is not torch.strided or not x.is_cpu or x.dtype.itemsize != 2:
        return x
    return x if x.shape[-1] % 32 == 0 else x.contiguous()


def by_onednn(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """oneDNN, which PyTorch carries, for float32 too."""
    linear = torch.ops.mkldnn._linear_pointwise
    a, b = _dense(a), _dense(b)
    if add:
        assert out is not None
        made: Tensor = linear.binary(a, _dense(out), b.t(), None, "add")
    else:
        made = linear(a, b.t(), None, "none", [], "")
    return made if out is None else out.copy_(made)


def by_blocks(
    a: Tensor,
    b: Tensor,
    out: Tensor | None = None,
    add: bool = False,
    level: str | None = None,
) -> Tensor:
    """Own kernels, see cpu/products.h; what is added to may be float32, whatever comes in."""
    (rows, deep), columns = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty(rows, columns)
    # The kernels trust these.
    if not (
        b.shape[0] == deep
        and b.dtype is a.dtype
        and out.dtype in (a.dtype, torch.float32)
        and out.shape == (rows, columns)
        and (out.stride(1) == 1 or columns <= 1)
    ):
        raise ShapeError("the operands of a product do not fit together")
    if 0 in (rows, deep, columns):
        return out if add else out.zero_()
    a, b = _with_lines(a), _with_lines(b)
    (a_row, a_deep), (b_row, b_deep) = _strides(a, 1), _strides(b, 0)
    facts = {
        **{"a_row": a_row, "a_deep": a_deep, "b_row": b_row, "b_deep": b_deep},
        **{"out_stride": out.stride(0), "wide": out.dtype is not a.dtype, "add": add},
        **{"rows": rows, "columns": columns, "deep": deep, "dtype": kernels.DTYPES[a.dtype]},
        "threads": kernels.threads(rows * deep * columns, kernels.MULTIPLY_ADDS_PER_THREAD),
    }
    memory = scratch(kernels.PRODUCT.scratch(level, **facts), "blocks")
    kernels.PRODUCT.bind(level, **facts)(*map(kernels.address, (a, b, out, memory)))
    return out


def _strides(x: Tensor, deep: int) -> tuple[int, int]:
    """The strides of what stays and of the dimension `deep`, which is summed over: one of them 1,
    also where there is just one of it.
    """
    row, along = x.stride(1 - deep), x.stride(deep)
    return (row, 1) if along == 1 or x.shape[deep] == 1 else (1, along)


def _with_lines(x: Tensor) -> Tensor:
    return x if 1 in x.stride() or 1 in x.shape else x.contiguous()


def _dense(x: Tensor) -> Tensor:
    # Part of a wider matrix takes oneDNN's reference code, which is a thousand times slower.
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


@functools.cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this PyTorch carries oneDNN's linear layers, and they take the dtype here."""
    mkldnn = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


PRODUCTS: Mapping[str, Product] = {
    "torch": by_torch,
    "onednn": by_onednn,
    "blocks": by_blocks,
}
"""Every source of products by the name that choices, `explain` and `backend=` use."""
