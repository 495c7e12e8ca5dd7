"""The LLaMA-style decoder with a mixture of experts in each layer."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gatedffn.compare.models import decoder
from gatedffn.compare.models.decoder import flops
from gatedffn.compare.settings import Setting
from gatedffn.mixture import MixtureFeedForward, Router, Routing
from gatedffn.sizing import UNGATED_FACTOR, weight_count

__all__ = ["build", "counted_loads", "flops", "width"]


def width(setting: Setting, arm: str, _vocabulary: int) -> int:
    """The width of an expert: those that a token goes through are together as large as a layer of
    the decoder.
    """
    target = weight_count(setting.d_model, UNGATED_FACTOR * setting.d_model, "relu")
    each = setting.multiple_of * weight_count(setting.d_model, 1, arm)
    return max(1, round(target / setting.top_k / each)) * setting.multiple_of


def build(setting: Setting, arm: str, vocabulary: int) -> nn.Module:
    """The decoder with a `MixtureFeedForward` in each layer, as Mixtral's: without shared experts,
    each token's weights the softmax of all, and divided by their sum.
    """

    def mixture() -> MixtureFeedForward:
        layer = MixtureFeedForward(
            setting.d_model,
            width(setting, arm, vocabulary),
            setting.experts,
            top_k=setting.top_k,
            variant=arm,
        )
        for name, weight in layer.experts.named_parameters():
            if weight.dim() == 3:
                held = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
                weight.stacked, weight.fan_in = held, weight.shape[2]  # type: ignore[attr-defined]
        return layer

    return _Balanced(decoder.with_layers(setting, vocabulary, mixture), setting.balance)


class _Balanced(nn.Module):
    """A decoder of mixtures, whose loss in training has that of their balance too.

    It is added for each layer, as in the Switch Transformer (Fedus et al. 2021, arXiv 2101.03961).
    """

    def __init__(self, decoder: nn.Module, balance: float) -> None:
        super().__init__()
        self.decoder, self.balance = decoder, balance

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found: list[Routing] = []
        with _watched(self, lambda _, routing: found.append(routing)):
            outputs = self.decoder(input_ids=input_ids, labels=labels)
        loss: Tensor = outputs.loss
        if self.training:
            loss = loss + self.balance * torch.stack([r.balance_loss() for r in found]).sum()
        return {"loss": loss, "logits": outputs.logits}


@contextmanager
def counted_loads(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """By the number of its layer, how often each expert is chosen until the end."""
    found: dict[int, Tensor] = {}

    def take(layer: int, routing: Routing) -> None:
        load = routing.load()
        found[layer] = found[layer] + load if layer in found else load

    with _watched(model, take):
        yield found


@contextmanager
def _watched(model: nn.Module, take: Callable[[int, Routing], None]) -> Iterator[None]:
    """Has every routing of a model told, with the number of its layer, until the end."""
    routers = [module for module in model.modules() if isinstance(module, Router)]

    def told(layer: int) -> Callable[[nn.Module, object, Routing], None]:
        return lambda _module, _inputs, routing: take(layer, routing)

    hooks = [router.register_forward_hook(told(i)) for i, router in enumerate(routers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
