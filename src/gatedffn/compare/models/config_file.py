"""Hugging Face configurations, from a file or by a name, and models of them with random weights."""

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from gatedffn.errors import SettingError, first_line
from gatedffn.files import expanded

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# What would have other code loaded, weights looked for or stored otherwise; and private fields.
_LEFT_OUT = re.compile(
    r"_.*|auto_map|custom_.*|architectures|.*attn_implementation.*|.*experts_implementation.*|"
    r"use_kernels|quantization_config|torch_dtype|dtype|transformers_version|tokenizer_class"
)


def read(source: str) -> str:
    """A configuration as JSON, from a file, a folder, or by a model's name at Hugging Face.

    Raises:
        SettingError: it cannot be read.
    """
    path = expanded(source)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        fields = _parsed(path)
    elif _NAME.fullmatch(source) and path.suffix != ".json":
        fields = _downloaded(source)
    else:
        raise SettingError(f"config: there is no file {source}")
    return json.dumps(_safe(fields), sort_keys=True)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingError(f"config: {path} is not a JSON file that can be read") from error
    if not isinstance(fields, dict):
        raise SettingError(f"config: {path} holds no JSON object, which a configuration is")
    return fields


def _downloaded(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        fields: dict[str, Any] = AutoConfig.from_pretrained(name, trust_remote_code=False).to_dict()
    except Exception as error:  # whatever the hub and its client raise: no network, no such name
        raise SettingError(
            f"config: there is no file {name}, and as a model's name at Hugging Face it cannot be "
            f"read: {first_line(error)}"
        ) from error
    return fields


def _safe(value: Any) -> Any:
    """The configuration without what would have code loaded, at every depth."""
    if isinstance(value, dict):
        return {k: _safe(v) for k, v in value.items() if not _LEFT_OUT.fullmatch(k)}
    return [_safe(v) for v in value] if isinstance(value, list) else value


def model_of(config: str, vocabulary: int, context: int | None = None) -> nn.Module:
    """The model as its configuration says, but for the vocabulary, on the default device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    decoder: Any = AutoModelForCausalLM
    fields = json.loads(config)
    kind = fields.pop("model_type", None)
    fields |= {"vocab_size": vocabulary, "use_cache": False}
    fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        made = AutoConfig.for_model(kind, **fields)
        longest = getattr(made, "max_position_embeddings", None)
        if context is not None and longest is not None and longest < context:
            raise SettingError(
                f"config: it has max_position_embeddings {longest}, and context is {context}: "
                "choose another with --context"
            )
        model: nn.Module = decoder.from_config(made, trust_remote_code=False)
    except SettingError:
        raise
    except Exception as error:  # whatever a configuration's and a model's code raise
        raise SettingError(f"config: no decoder can be made of it: {first_line(error)}") from error
    # Not every one divides the loss by all processes' tokens; each window has as many.
    model.accepts_loss_kwargs = False  # type: ignore[assignment]
    return model.float()
