"""The user's own architecture as the decoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compare.conftest import Log
from gatedffn.compare.models import build, cost, initialise, mismatches
from gatedffn.compare.models.config import read_config
from gatedffn.compare.settings import Setting, make_setting, run_key
from gatedffn.compare.study import prepare, study
from gatedffn.errors import SettingError
from gatedffn.layers import FeedForward

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "pad_token_id": 31999,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "resid_pdrop": 0.1,
}


def written(folder: Path, **fields: Any) -> str:
    path = folder / "my_config.json"
    path.write_text(json.dumps(fields))
    return str(path)


def setting_of(folder: Path, **fields: Any) -> Setting:
    told = read_config(written(folder, **fields))
    return make_setting("quick", "decoder", context=32, variants=("relu", "swiglu"), **told)


def test_a_llama_at_equal_parameters(tmp_path: Path) -> None:
    setting = setting_of(tmp_path, **LLAMA)
    assert (setting.d_model, setting.layers) == (32, 2)
    costs = {arm: cost(setting, arm, 256) for arm in ("relu", "swiglu")}
    # Its own width for its own kind, half as much again without a gate.
    assert {arm: c.width for arm, c in costs.items()} == {"swiglu": 80, "relu": 120}
    assert mismatches(setting, costs) == {"relu": 0.0, "swiglu": 0.0}
    model = build(setting, "relu", 256)
    assert [m.variant for m in model.modules() if isinstance(m, FeedForward)] == ["relu"] * 2
    assert not any("MLP" in type(m).__name__ for m in model.modules())
    assert model.get_parameter("model.embed_tokens.weight").shape == (256, 32)
    assert model.get_parameter("model.layers.0.self_attn.k_proj.weight").shape == (16, 32)


def test_ties_biases_and_dropout_are_the_configs(tmp_path: Path) -> None:
    model = build(setting_of(tmp_path, **GPT2), "geglu", 256)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")
    block = model.get_submodule("transformer.h.1.mlp")
    layer = next(m for m in block.modules() if isinstance(m, FeedForward))
    weights = layer.weights()
    assert all(b is not None for b in (weights.gate_bias, weights.up_bias, weights.down_bias))
    assert [m.p for m in block.modules() if isinstance(m, torch.nn.Dropout)] == [0.1]
    untied = build(setting_of(tmp_path, **LLAMA, mlp_bias=False), "geglu", 256)
    assert untied.get_parameter("lm_head.weight") is not untied.get_parameter(
        "model.embed_tokens.weight"
    )
    assert not any("bias" in name for name, _ in untied.named_parameters())


def test_a_transposed_matrix_starts_by_its_own_fan_in(tmp_path: Path) -> None:
    model = build(setting_of(tmp_path, **GPT2), "relu", 256)
    initialise(model, "fan_in", seed=0)
    weight = model.get_parameter("transformer.h.0.attn.c_attn.weight").detach()
    assert weight.shape == (32, 96)
    assert abs(float(weight.std()) / 32**-0.5 - 1) < 5 / (2 * weight.numel()) ** 0.5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 1}, "none was found"),
        (
            {**LLAMA, "model_type": "mixtral", "num_local_experts": 2},
            "experts",
        ),
        (
            {"model_type": "opt", "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
            | {"num_hidden_layers": 1, "num_attention_heads": 4},
            "other parts than a feed-forward's own",
        ),
        (
            {"model_type": "bert", "hidden_size": 32, "intermediate_size": 48}
            | {"num_hidden_layers": 1, "num_attention_heads": 4},
            "BertLMHeadModel sees the tokens that it is to predict",
        ),
        (
            {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}}
            | {
                "vision_config": {
                    "hidden_size": 32,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 1,
                }
            },
            "has not the vocabulary that vocab_size says",
        ),
        ({"model_type": "no_such"}, "no decoder can be made of it: .*no_such"),
        ({"hidden_size": 32}, "no decoder can be made of it"),
        ({"model_type": "vit", "hidden_size": 32}, "no decoder can be made of it"),
        ({**LLAMA, "hidden_size": 33}, "no decoder can be made of it"),
        ({**LLAMA, "hidden_size": "wide"}, "no decoder can be made of it"),
    ],
)
def test_what_cannot_be_exchanged_is_refused(
    tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(SettingError, match=f"^config: .*{reason}") as caught:
        read_config(written(tmp_path, **fields))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for content, message in (("{", "not a JSON file"), ("[1]", "holds no JSON object")):
        path = tmp_path / "config.json"
        path.write_text(content)
        with pytest.raises(SettingError, match=message):
            read_config(str(tmp_path))
    for name in ("missing.json", "../up", "/no/such/folder", "a/b/c", "~nosuchuser/a"):
        with pytest.raises(SettingError, match="there is no file"):
            read_config(name)


def test_a_name_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match="as a model's name at Hugging Face") as caught:
        read_config("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_no_code_and_no_name_of_the_file_is_used(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: ...\n")
    fields = {
        **LLAMA,
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"},
        "_name_or_path": str(tmp_path),
        "attn_implementation": "someone/kernels",
        "_attn_implementation": "someone/kernels",
        "quantization_config": {"quant_method": "gptq"},
    }
    told = read_config(written(tmp_path, **fields))
    assert told == read_config(written(tmp_path, **LLAMA))
    assert not (tmp_path / "ran").exists()


def test_the_key_of_a_run_depends_on_what_the_file_says_not_on_where_it_is(tmp_path: Path) -> None:
    from compare.test_settings import HERE, RUN

    setting = setting_of(tmp_path, **LLAMA)
    (tmp_path / "other").mkdir()
    again = setting_of(tmp_path / "other", **dict(reversed(LLAMA.items())))
    wider = setting_of(tmp_path, **{**LLAMA, "intermediate_size": 96})
    assert run_key(setting, RUN, HERE) == run_key(again, RUN, HERE) != run_key(wider, RUN, HERE)


def test_it_trains(tiny: Setting, prose: Path, tmp_path: Path) -> None:
    told = read_config(written(tmp_path, **LLAMA))
    setting = replace(tiny, **told, seeds=1)
    result = study(prepare(setting, [str(prose)]), tmp_path / "out", Log())
    assert result is not None
    for runs in result.runs.values():
        curve = runs[0]["result"]["curve"]
        assert curve[-1][1] < curve[0][1]


def test_longer_than_its_positions(tmp_path: Path) -> None:
    setting = replace(setting_of(tmp_path, **LLAMA), context=65)
    with pytest.raises(SettingError, match="max_position_embeddings 64, and context is 65"):
        build(setting, "relu", 256)


def test_only_a_decoder_has_a_config() -> None:
    with pytest.raises(SettingError, match="it makes a decoder, and the model is t5"):
        make_setting("quick", "t5", config="{}")
