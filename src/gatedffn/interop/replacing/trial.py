"""How a stranger's module is run for a trial: on which numbers, and with nothing left behind."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

# Up to beyond the limits that half precision is clamped to. Below 1e-6 the xIELU of transformers
# holds its exponential, and a test must not tell the two apart there.
DECADES = -5.0, 8.0


def values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers of both signs: half of them where activations bend, half of every size."""

    def uniform(low: float, high: float) -> Tensor:
        made = torch.empty(shape, dtype=torch.float64, device="cpu")
        return made.uniform_(low, high, generator=generator)

    near = uniform(-8.0, 8.0)
    far = uniform(-1.0, 1.0).sign() * 10.0 ** uniform(*DECADES)
    return torch.where(uniform(0.0, 1.0) < 0.5, near, far)


@contextmanager
def undisturbed(module: nn.Module, training: bool) -> Iterator[None]:
    """Runs in a mode; afterwards modes, attributes and random numbers are what they were."""
    before = [(m, dict(vars(m))) for m in module.modules()]
    devices = {p.device for p in module.parameters() if p.device.type not in ("cpu", "meta")}
    kinds = {"cpu", *(device.type for device in devices)}
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for kind in kinds - {"cpu"}:
            own = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(own, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            for m, _ in before:
                m.training = training
            yield
        finally:
            for m, attributes in before:
                for name in set(vars(m)) - set(attributes):
                    del vars(m)[name]
                vars(m).update(attributes)


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Has frozen parameters ask for a gradient meanwhile: what a formula learns is told by it."""
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
