"""The gated convolutions of Dauphin et al. 2016 (arXiv 1612.08083), and an LSTM of their size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedffn.compare.models.counting import count, multiplied, nearest
from gatedffn.compare.settings import LSTM, Setting
from gatedffn.convolution import GatedConvStack


def width(setting: Setting, arm: str, vocabulary: int) -> int:
    """The channels at which an arm has the parameters of GLU at d_model."""

    def counted(candidate: str, channels: int) -> int:
        with torch.device("meta"):
            return count(_with_channels(setting, candidate, vocabulary, channels))

    target = counted("glu", setting.d_model)
    return nearest(lambda channels: counted(arm, channels), target)


def build(setting: Setting, arm: str, vocabulary: int) -> nn.Module:
    """The network of an arm."""
    return _with_channels(setting, arm, vocabulary, width(setting, arm, vocabulary))


def flops(_setting: Setting, model: nn.Module) -> int:
    """Six for each weight."""
    return 6 * multiplied(model)


class SequenceModel(nn.Module):
    """A language model of an embedding, a body over (batch, length, channels), and a head."""

    def __init__(self, vocabulary: int, d_embedding: int, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d_embedding)
        self.body = body
        self.head = nn.Linear(channels, vocabulary, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(self.embedding(input_ids)))
        if labels is None:
            return {"logits": logits}
        predictions = logits[:, :-1].flatten(0, 1).float()
        return {"loss": F.cross_entropy(predictions, labels[:, 1:].flatten()), "logits": logits}


class _Convolutions(nn.Module):
    def __init__(self, stack: GatedConvStack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.stack(x.transpose(1, 2))
        return output.transpose(1, 2)


class _Recurrence(nn.Module):
    def __init__(self, d_embedding: int, channels: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d_embedding, channels, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.lstm(x)[0]
        return output


def _with_channels(setting: Setting, arm: str, vocabulary: int, channels: int) -> SequenceModel:
    # Narrower than every layer, as in the published networks, so that no arm is spared the
    # change of width in its first block.
    d_embedding = max(1, setting.d_model // 2)
    body: nn.Module
    if arm == LSTM:
        body = _Recurrence(d_embedding, channels, setting.layers)
    else:
        blocks = [[(channels, setting.kernel_size)]] * setting.layers
        body = _Convolutions(GatedConvStack(d_embedding, blocks, variant=arm))
    return SequenceModel(vocabulary, d_embedding, body, channels)
