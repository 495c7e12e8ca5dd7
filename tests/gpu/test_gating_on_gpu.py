"""Gating by the public functions on a GPU: none of this can be seen in the interpreter."""

from collections.abc import Callable

import pytest
import torch
from support.cases import Inputs, cases, draw, dtypes, with_gradients
from support.compare import assert_matches, same_bits
from support.gating import by_hand
from torch import Tensor

from gatedffn.activations import Value
from gatedffn.functional import ORDERS, Order, gating, glu
from gatedffn.ops.gating.reference import branches
from gatedffn.variants import VARIANTS, Variant

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same inputs as leaves on a device."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().to(device).requires_grad_()

    parameters: dict[str, Value] = {
        n: leaf(v) if isinstance(v, Tensor) else v for n, v in inputs.parameters.items()
    }
    up = None if inputs.up is None else leaf(inputs.up)
    return Inputs(inputs.row, leaf(inputs.gate), up, parameters, inputs.grad.to(device))


@cases
@dtypes
def test_output_and_gradients(row: Variant, learned: bool, dtype: torch.dtype) -> None:
    inputs = draw(row, (37, 1032), dtype, learned=learned)
    truth, eager = by_hand(inputs.to(torch.float64)), by_hand(moved(inputs, "cuda"))
    for name, result in with_gradients(moved(inputs, "cuda")):
        assert_matches(result, truth[name], eager[name].cpu(), name)


@pytest.mark.parametrize("order", ORDERS)
def test_a_packed_tensor_gives_the_bits_of_its_branches(order: Order) -> None:
    x = torch.randn(37, 2064, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(37, 1032, device="cuda", dtype=torch.bfloat16)
    hidden = glu(x, variant="swiglu", order=order)
    (found,) = torch.autograd.grad(hidden, x, grad)
    leaves = [t.detach().contiguous().requires_grad_() for t in branches(x, -1, order)]
    expected = gating(leaves[0], leaves[1])
    assert same_bits(hidden.cpu(), expected.cpu())
    gradients = torch.autograd.grad(expected, leaves, grad)
    for part, gradient in zip(branches(found, -1, order), gradients, strict=True):
        assert same_bits(part.contiguous().cpu(), gradient.cpu())


def both_ways(inputs: Inputs, function: Callable[..., Tensor] = gating) -> list[Tensor]:
    """Output and gradients, one of them of a learned parameter beside a fixed one."""
    hidden = function(inputs.gate, inputs.up, inputs.row, **inputs.parameters)
    found = torch.autograd.grad(hidden, list(inputs.tensors().values()), inputs.grad)
    return [hidden.detach(), *found]


def oai(device: str) -> Inputs:
    return moved(draw(VARIANTS["swiglu_oai"], (67, 512), torch.float32, learned=True), device)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_under_a_compiler() -> None:
    torch.compiler.reset()
    found = both_ways(oai("cuda"), torch.compile(gating, fullgraph=True))
    truth, eager = by_hand(oai("cpu").to(torch.float64)), by_hand(oai("cuda"))
    for name, result in zip(("output", "gate", "up", "beta"), found, strict=True):
        assert_matches(result.cpu(), truth[name], eager[name].cpu(), name)


def test_a_cuda_graph_replays_both_kernels() -> None:
    inputs = oai("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both_ways(inputs)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both_ways(inputs)
    with torch.no_grad():
        for tensor in (inputs.gate, inputs.up):
            assert tensor is not None
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for a, b in zip(found, both_ways(inputs), strict=True):
        assert same_bits(a.cpu(), b.cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_kernels_are_launched_on_the_device_of_their_tensors() -> None:
    gate, up = torch.randn(2, 64, 64, device="cuda:0")
    elsewhere = gating(gate.to("cuda:1"), up.to("cuda:1"))
    assert elsewhere.device == torch.device("cuda:1")
    assert same_bits(elsewhere.cpu(), gating(gate, up).cpu())


def test_more_elements_than_32_bits_count() -> None:
    rows, columns = (1 << 31) // 4096 + 8, 4096
    needed = 8 * rows * columns * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"the GPU has less than {needed >> 30} GiB of free memory")
    x = torch.zeros(rows, 2 * columns, dtype=torch.bfloat16, device="cuda")
    x[-8:].normal_()
    for packed in (x, x.view(1, -1)):
        leaf = packed.detach().requires_grad_()
        hidden = glu(leaf, variant="swiglu", order="interleaved")
        (found,) = torch.autograd.grad(hidden, leaf, torch.ones_like(hidden))
        end = x[-8:].detach().clone().requires_grad_()
        expected = glu(end, variant="swiglu", order="interleaved")
        (d_end,) = torch.autograd.grad(expected, end, torch.ones_like(expected))
        assert same_bits(hidden.view(rows, columns)[-8:].cpu(), expected.cpu())
        assert same_bits(found.view(rows, 2 * columns)[-8:].cpu(), d_end.cpu())
        assert not hidden.view(rows, columns)[:-8].any()
        del hidden, found
