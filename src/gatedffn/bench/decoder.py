"""The contestants of a whole language model: what its feed-forward layers are worth in one.

It is Llama's architecture as transformers has it, with weights drawn by chance, the same for every
process. What differs is whether this library takes its layers over, and whether it is compiled.
"""

from contextlib import AbstractContextManager
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatedffn
from gatedffn.bench import contestants
from gatedffn.bench.contestants import Contestant
from gatedffn.bench.inputs import DecoderInputs
from gatedffn.bench.workloads import SEED, VOCABULARY, Workload
from gatedffn.interop import replace

OLDEST = 5  # the transformers whose caches say how full they are


def make_decoder(workload: Workload, device: torch.device) -> nn.Module:
    """The model, its weights rounded to the workload's dtype."""
    llama = import_module("transformers.models.llama")
    config = llama.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=workload.d_model,
        intermediate_size=workload.d_hidden,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.key_heads,
        pad_token_id=None,
    )
    torch.manual_seed(SEED)
    with device:
        model: nn.Module = llama.LlamaForCausalLM(config)
    for parameter in model.parameters():  # the angles of the positions stay in float32
        parameter.data = parameter.data.to(workload.torch_dtype)
    return model.train(workload.training).requires_grad_(workload.training)


def train(model: nn.Module, inputs: DecoderInputs) -> Tensor:
    """Makes the gradients of the mean loss of each next token; returns the scores."""
    scores: Tensor = model(input_ids=inputs.ids, use_cache=False).logits
    loss = F.cross_entropy(scores[0, :-1].float(), inputs.ids[0, 1:])
    torch.autograd.backward(loss)
    return scores


def first_layer(model: nn.Module) -> dict[str, Tensor]:
    """The feed-forward weights of the first layer, whose gradients come through all others."""
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    layer = "model.layers.0.mlp"
    return {name: model.get_parameter(f"{layer}.{of}.weight") for name, of in names.items()}


class Eager(Contestant):
    """transformers as it comes."""

    label = "transformers, eager"
    needs = ("transformers", "torch")

    def __init__(self, workload: Workload, inputs: DecoderInputs, threads: int) -> None:
        torch.set_num_threads(threads)
        self.workload, self.inputs = workload, inputs
        self.model = make_decoder(workload, inputs.ids.device)
        self.called = self.wrap(self.model)
        self.scores: Tensor = inputs.ids
        self.cache = None if workload.training else self._cache()

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        missing = super().refusal(workload)
        if missing is None and int(version("transformers").partition(".")[0]) < OLDEST:
            return f"its transformers is {version('transformers')}, older than {OLDEST}"
        return missing

    def wrap(self, model: nn.Module) -> nn.Module:
        """What is called in its place."""
        return model

    def _cache(self) -> Any:
        """Keys and values of the past; the last token's are written anew in every step."""
        past = self.inputs.ids[:, :-1]
        kind = import_module("transformers").StaticCache
        cache = kind(config=self.model.config, max_cache_len=self.inputs.ids.shape[1])
        with self.mode():
            self.model(input_ids=past, past_key_values=cache, use_cache=True)
        return cache

    def mode(self) -> AbstractContextManager[object]:
        return torch.inference_mode(not self.workload.training)

    def prepare(self) -> None:
        self.release()
        if self.cache is not None:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.workload.past)

    def step(self) -> None:
        if self.cache is None:
            self.scores = train(self.called, self.inputs)
        else:
            last = self.inputs.ids[:, -1:]
            made = self.called(input_ids=last, past_key_values=self.cache, use_cache=True)
            self.scores = made.logits

    def results(self) -> dict[str, Tensor]:
        found = {"output": self.scores.detach()[0]}
        if self.workload.training:
            of_layer = first_layer(self.model)
            found |= {n: weight.grad for n, weight in of_layer.items() if weight.grad is not None}
        return found

    def release(self) -> None:
        self.scores = self.inputs.ids
        for parameter in self.model.parameters():
            parameter.grad = None


class Compiled(Eager):
    label = "transformers, torch.compile"
    tunes = True

    def wrap(self, model: nn.Module) -> nn.Module:
        return contestants.compiled(model)


class Ours(Eager):
    label = contestants.Ours.label
    tunes = True
    tolerance = contestants.Ours.tolerance

    @classmethod
    def version(cls) -> str:
        return gatedffn.__version__

    def wrap(self, model: nn.Module) -> nn.Module:
        replace(model, strict=True)
        return model


class OursCompiled(Ours):
    label = contestants.OursCompiled.label

    def wrap(self, model: nn.Module) -> nn.Module:
        return contestants.compiled(super().wrap(model))
