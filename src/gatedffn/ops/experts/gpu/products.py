"""The launches of the kernels of experts: grouped products, each over all experts at once.

Weights are views (experts, units, deep) of any strides, `deep` being summed over; rows are
(slots, ...), sorted by expert and dense. All else is as the kernels have it. How they are cut comes
from the layer's table: what every chip can run, with rows as few as an expert has on average.
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from gatedffn.ops import gpu
from gatedffn.ops.experts.gpu import kernels
from gatedffn.ops.experts.gpu.routes import Routes
from gatedffn.ops.feed_forward.gpu import configs
from gatedffn.ops.feed_forward.gpu.configs import Config
from gatedffn.ops.gpu import Formula

FEWEST = 16  # rows that a matrix multiplication takes
PARTS = 256 << 20  # bytes of what slots give that are held at a time
SUMMED = 1024  # columns of a program that adds up what the slots of a token gave


def cut(kernel: configs.Kernel, x: Tensor, routes: Routes, units: int) -> Config:
    """The configuration of a grouped product."""
    mean = triton.cdiv(routes.rows, routes.filled)
    config = configs.pick(kernel, "other", gpu.kind_of(x.dtype), mean, units)
    return replace(config, tokens=max(FEWEST, min(config.tokens, triton.next_power_of_2(mean))))


def hidden_values(
    routes: Routes,
    x: Tensor,
    weights: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    formula: Formula,
    hidden: Tensor | None,
    out_gate: Tensor | None,
    out_up: Tensor | None,
) -> None:
    """Writes `phi(x W_gate^T + b) * psi(x W_up^T + b)` of every row, and both branches, into those
    that are given. `weights`, one a slot, weigh the tokens first.
    """
    _, d_hidden, d_model = gate.shape
    config = cut("hidden_values", x, routes, d_hidden)
    if up is None:
        config = replace(config, units=2 * config.units, subtiles=4 * config.subtiles)
    table, most = routes.blocks(config.tokens)
    with gpu.on_device_of(x):
        kernels.hidden_kernel[(most * triton.cdiv(d_hidden, config.units),)](
            *(routes.order, routes.starts, table, x, weights, gate, up, gate_bias, up_bias),
            *(hidden, out_gate, out_up, *formula.values()),
            *(most, routes.experts, routes.slots, d_hidden, d_model, x.stride(0)),
            *(*gate.stride(), *_strides(up)),
            **formula.constants(),
            SUBTILES=config.subtiles,
            ROUGH=x.dtype != torch.float32,
            **_constants(config, x),
        )


def summed(
    routes: Routes,
    weights: Tensor | None,
    products: tuple[tuple[Tensor, Tensor], ...],
    bias: Tensor | None,
    out: Tensor | None,
    x: Tensor | None = None,
) -> Tensor | None:
    """Writes for each token the sum over its slots, times `weights`, of the sum of one or two
    products of rows and weights.

    Returns:
        With `x` what each slot gives times the token's row of it, summed.
    """
    (one, one_weight), (other, other_weight) = (*products, (None, None))[:2]
    assert one is not None
    assert one_weight is not None
    _, columns, deep = one_weight.shape
    config = cut("branch_gradients", one, routes, columns)
    table, most = routes.blocks(config.tokens)
    of_part = triton.cdiv(columns, config.units)
    dots = None
    if x is not None:
        dots = one.new_zeros(of_part, routes.rows, dtype=torch.float32)
    size = max(PARTS // (4 * routes.rows) // config.units, 1) * config.units
    # Slots times the columns of a part, in float32.
    parts = one.new_empty(
        0 if out is None else routes.rows * min(size, columns), dtype=torch.float32
    )
    with gpu.on_device_of(one):
        for start in range(0, columns, size):
            part = slice(start, min(start + size, columns))
            units = part.stop - start
            weight = one_weight[:, part]
            beside = None if other_weight is None else other_weight[:, part]
            kernels.product_kernel[(most * triton.cdiv(units, config.units),)](
                *(routes.order, routes.starts, table, one, weight, other, beside),
                None if bias is None else bias[:, part],
                None if out is None else parts,
                None if x is None else x[:, part],
                None if dots is None else dots[start // config.units :],
                *(most, routes.experts, routes.slots, units, deep, routes.rows),
                0 if x is None else x.stride(0),
                *(*weight.stride(), *_strides(beside), 0 if bias is None else bias.stride(0)),
                **_constants(config, one),
            )
            if out is None:
                continue
            block = min(SUMMED, triton.next_power_of_2(units))
            kernels.sum_kernel[(len(out), triton.cdiv(units, block))](
                *(parts, routes.index, weights, out[:, part]),
                *(routes.experts, routes.slots, units, out.stride(0)),
                COLUMNS=block,
            )
    return None if dots is None else dots.sum(0)


def branch_gradients(
    routes: Routes,
    grad: Tensor,
    weights: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    formula: Formula,
    d_gate: Tensor | None,
    d_up: Tensor | None,
    hidden: Tensor | None,
    learned: Collection[str],
    dotted: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Writes the gradients of the branches of all rows and the hidden values, of those that have a
    place, all times `weights`.

    Returns:
        The float64 sums of the gradients of learned parameters, one for each unit, by name; and if
        `dotted` the gradient of each slot's weight.
    """
    _, d_hidden, d_out = down.shape
    config = cut("branch_gradients", grad, routes, d_hidden)
    table, most = routes.blocks(config.tokens)
    along = triton.cdiv(d_hidden, config.units)
    # A block that is left at once, or a slot that no expert has, writes nothing.
    sums = {name: grad.new_zeros(most, d_hidden, dtype=torch.float32) for name in learned}
    dots = None
    if dotted:
        of_bias = down_bias is not None
        dots = grad.new_zeros(along * config.subtiles + of_bias, routes.rows, dtype=torch.float32)
    with gpu.on_device_of(grad):
        kernels.branch_gradients_kernel[(most * along,)](
            *(routes.order, routes.starts, table, grad, weights, down),
            down_bias if dotted else None,
            *(gate, up, d_gate, d_up, hidden),
            *[*(sums.get(name) for name in formula.of_phi), None, None][:2],
            *(dots, *formula.values(), most, routes.experts, routes.slots, d_hidden, d_out),
            *(routes.rows, grad.stride(0), *down.stride()),
            **formula.constants(),
            SUBTILES=config.subtiles,
            ROUGH=grad.dtype != torch.float32,
            **_constants(config, grad),
        )
    made = {name: parts.sum(0, dtype=torch.float64) for name, parts in sums.items()}
    return made, None if dots is None else dots.sum(0)


def weight_gradient(
    routes: Routes, rows: Tensor, given: Tensor, weights: Tensor | None, out: Tensor
) -> None:
    """Writes the gradient of a weight, of the rows that its product made and of what tokens were
    given, times `weights`; zeros for an expert without any.
    """
    experts, units, deep = out.shape
    config = configs.pick("branch_gradients", "other", gpu.kind_of(rows.dtype), units, deep)
    tiles = triton.cdiv(units, config.tokens) * triton.cdiv(deep, config.units)
    with gpu.on_device_of(rows):
        kernels.weight_gradient_kernel[(tiles, experts)](
            *(routes.order, routes.starts, rows, given, weights, out),
            *(routes.slots, units, deep, given.stride(0), *out.stride()),
            UNITS=config.tokens,
            DEEPS=config.units,
            ROWS=config.deep,
            PRECISION=_precision(rows),
            num_warps=config.warps,
            # Of two loads, the second where the first says, each has half of them.
            num_stages=2 * config.stages,
        )


def bias_gradient(
    routes: Routes, rows: Tensor, weights: Tensor | None, gathered: bool, out: Tensor
) -> None:
    """Writes the sum over each expert's rows; `gathered` are those of tokens, times `weights`."""
    experts, columns = out.shape
    block = min(128, triton.next_power_of_2(columns))
    with gpu.on_device_of(rows):
        kernels.bias_gradient_kernel[(triton.cdiv(columns, block), experts)](
            *(routes.order, routes.starts, rows, weights, out),
            *(routes.slots, columns, rows.stride(0), *out.stride()),
            GATHERED=gathered,
            ROWS=FEWEST,
            COLUMNS=block,
        )


def _strides(weight: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if weight is None else weight.stride()


def _precision(x: Tensor) -> str:
    return "tf32" if gpu.kind_of(x.dtype) == "tf32" else "ieee"


def _constants(config: Config, x: Tensor) -> dict[str, Any]:
    return {
        **{"ROWS": config.tokens, "UNITS": config.units, "DEEP": config.deep},
        **{"GROUP": config.group, "PRECISION": _precision(x)},
        **{"num_warps": config.warps, "num_stages": config.stages},
    }
