"""The rows: how models and libraries store feed-forward blocks. Facts only; no code but helpers.

Read from the sources of each; `model.py` has the words. The gate is the matrix whose product goes
through the activation, whatever its owner calls it.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gatedffn.layouts.model import Extra, Layout, Role, Stored

GATE_UP: tuple[Role, Role] = ("gate", "up")
UP_GATE: tuple[Role, Role] = ("up", "gate")
NO_BIAS = None


def _matrix(
    name: str,
    *roles: Role,
    axes: str | None = None,
    bias: str | None = "bias",
    block: int | None = None,
    needs_bias: bool = False,
) -> Stored:
    """`name.weight` with `name.bias`, stored (out, in), unless told otherwise.

    A name that ends with a dot and a word, such as `wi.kernel`, has its bias beside it; a `bias`
    that holds a dot or stands for a name without one is a name of its own.
    """
    usual = "p d" if len(roles) == 2 else ("d h" if roles == ("down",) else "h d")
    whole = name if name.endswith((".kernel", ".w")) else f"{name}.weight"
    beside = None if bias is None else f"{whole.rpartition('.')[0]}.{bias}"
    return Stored(
        name=whole,
        roles=roles,
        axes=axes or usual,
        bias=beside,
        block=block,
        needs_bias=needs_bias,
    )


def _array(
    name: str,
    *roles: Role,
    axes: str,
    bias: str | None = None,
    bias_axes: str | None = None,
    block: int | None = None,
    needs_bias: bool = False,
) -> Stored:
    """A parameter by its whole name."""
    return Stored(
        name=name,
        roles=roles,
        axes=axes,
        bias=bias,
        bias_axes=bias_axes,
        block=block,
        needs_bias=needs_bias,
    )


def _three(gate: str, up: str, down: str, bias: str | None = "bias") -> tuple[Stored, ...]:
    return (
        _matrix(gate, "gate", bias=bias),
        _matrix(up, "up", bias=bias),
        _matrix(down, "down", bias=bias),
    )


def _turned(gate: str, up: str, down: str, bias: str = "bias") -> tuple[Stored, ...]:
    """Three matrices stored (in, out)."""
    return (
        _matrix(gate, "gate", axes="d h", bias=bias),
        _matrix(up, "up", axes="d h", bias=bias),
        _matrix(down, "down", axes="h d", bias=bias),
    )


def _packed(
    first: str,
    down: str,
    order: tuple[Role, Role],
    block: int | None = None,
    bias: str | None = "bias",
) -> tuple[Stored, ...]:
    return (_matrix(first, *order, block=block, bias=bias), _matrix(down, "down", bias=bias))


def _two(up: str, down: str, bias: str | None = "bias") -> tuple[Stored, ...]:
    return (_matrix(up, "up", bias=bias), _matrix(down, "down", bias=bias))


def _experts(
    first: str,
    down: str,
    order: tuple[Role, Role],
    axes: str = "e p d",
    down_axes: str = "e d h",
    block: int | None = None,
) -> tuple[Stored, ...]:
    """Two parameters that hold all experts, without biases."""
    return (
        _array(first, *order, axes=axes, block=block),
        _array(down, "down", axes=down_axes),
    )


def _stacked(
    gate: str, up: str, down: str, axes: str = "e h d", down_axes: str = "e d h"
) -> tuple[Stored, ...]:
    """Three parameters that hold all experts, without biases."""
    return (
        _array(gate, "gate", axes=axes),
        _array(up, "up", axes=axes),
        _array(down, "down", axes=down_axes),
    )


MLP = ("layers.{layer}.mlp",)
BLOCKS = ("blocks.{layer}.mlp",)
H = ("h.{layer}.mlp",)
EXPERTS = ("layers.{layer}.mlp.experts",)
SHARED = ("layers.{layer}.mlp.shared_expert", "layers.{layer}.mlp.shared_experts")
FEED_FORWARD = ("layers.{layer}.feed_forward",)

SEPARATE = (
    Layout(
        name="llama",
        used_by="HF Llama, Mistral, Qwen 2 and 3, OLMo 1 to 3, Cohere, StableLM, Granite, SmolLM3, "
        "Exaone 4, Seed-OSS, the dense and shared blocks of DeepSeek, MLX, Liger, FLA",
        stored=_three("gate_proj", "up_proj", "down_proj"),
        places=(*MLP, *SHARED, *FEED_FORWARD, "layers.{layer}.feed_forward.shared_expert"),
        width="intermediate_size",
        architectures=(
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
            "OlmoForCausalLM",
            "Olmo2ForCausalLM",
            "Olmo3ForCausalLM",
            "CohereForCausalLM",
            "Cohere2ForCausalLM",
            "StableLmForCausalLM",
            "GraniteForCausalLM",
            "SmolLM3ForCausalLM",
            "Exaone4ForCausalLM",
            "SeedOssForCausalLM",
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
            "Llama4ForConditionalGeneration",
        ),
    ),
    Layout(
        name="gemma",
        used_by="HF Gemma 1 to 4, T5Gemma",
        stored=_three("gate_proj", "up_proj", "down_proj"),
        places=MLP,
        activation=("hidden_activation", "hidden_act"),
        # The first configurations say gelu, and the models were trained with the tanh form.
        spellings={"gelu": "geglu_tanh"},
        width="intermediate_size",
        architectures=(
            "GemmaForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "Gemma3ForConditionalGeneration",
            "T5GemmaForConditionalGeneration",
        ),
    ),
    Layout(
        name="gemma3n",
        used_by="HF Gemma 3n",
        stored=_three("gate_proj", "up_proj", "down_proj"),
        places=MLP,
        activation=("hidden_activation",),
        width="intermediate_size",
        architectures=("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        beyond="it keeps the largest gates of a token only (activation_sparsity_pattern)",
    ),
    Layout(
        name="recurrent-gemma",
        used_by="HF RecurrentGemma",
        stored=_three("gate_proj", "up_proj", "down_proj"),
        places=("layers.{layer}.mlp_block",),
        activation=("hidden_activation",),
        spellings={"gelu": "geglu_tanh"},
        width="intermediate_size",
        both_halves=True,
        architectures=("RecurrentGemmaForCausalLM",),
    ),
    Layout(
        name="falcon-h1",
        used_by="HF Falcon-H1",
        stored=_three("gate_proj", "up_proj", "down_proj"),
        places=FEED_FORWARD,
        width="intermediate_size",
        architectures=("FalconH1ForCausalLM",),
        beyond="it multiplies the gate and the output by mlp_multipliers",
    ),
    Layout(
        name="bitnet",
        used_by="HF BitNet b1.58",
        stored=_three("gate_proj", "up_proj", "down_proj"),
        places=MLP,
        extras=(Extra(name="ffn_sub_norm.weight", key="hidden_norm.weight"),),
        variants=("relu2_glu",),
        width="intermediate_size",
        architectures=("BitNetForCausalLM",),
    ),
    Layout(
        name="llama-original",
        used_by="LLaMA 1 to 3 and Mistral as published, InternLM2, LFM2, torchtitan, torchtune, "
        "OLMo-core, Z-Image, HiDream, Ideogram 4, Fibo 2",
        stored=_three("w1", "w3", "w2"),
        places=(*FEED_FORWARD, *MLP, "blocks.{layer}.feed_forward", *SHARED),
        architectures=("InternLM2ForCausalLM", "Lfm2ForCausalLM"),
        variants=("swiglu",),
    ),
    Layout(
        name="bitnet-original",
        used_by="BitNet b1.58 as published",
        stored=_three("w1", "w3", "w2"),
        places=FEED_FORWARD,
        extras=(Extra(name="ffn_sub_norm.weight", key="hidden_norm.weight"),),
        variants=("relu2_glu",),
    ),
    Layout(
        name="eva",
        used_by="EVA-02, DINOv2 and DINOv3, xformers without packing",
        stored=_three("w1", "w2", "w3"),
        places=BLOCKS,
        extras=(
            Extra(name="ffn_ln.weight", key="hidden_norm.weight"),
            Extra(name="ffn_ln.bias", key="hidden_norm.bias"),
        ),
        variants=("swiglu",),
    ),
    Layout(
        name="qwen1",
        used_by="Qwen 1",
        stored=_three("w2", "w1", "c_proj"),
        places=H,
        variants=("swiglu",),
        width="intermediate_size",
        both_halves=True,
        architectures=("QWenLMHeadModel",),
    ),
    Layout(
        name="t5",
        used_by="T5 v1.1, mT5, UMT5, LongT5, UDOP, Pix2Struct, Kosmos-2.5, UL2, Flan-UL2",
        stored=_three("wi_0", "wi_1", "wo", bias=NO_BIAS),
        places=(
            "block.{layer}.layer.{n}.DenseReluDense",
            "layer.{layer}.mlp.DenseReluDense",
            "layer.{layer}.mlp",
        ),
        activation=("feed_forward_proj", "dense_act_fn"),
        width="d_ff",
        architectures=(
            "T5ForConditionalGeneration",
            "T5EncoderModel",
            "MT5ForConditionalGeneration",
            "UMT5ForConditionalGeneration",
            "LongT5ForConditionalGeneration",
        ),
    ),
    Layout(
        name="t5x",
        used_by="mesh-tensorflow, T5X, flaxformer, MaxText, where the first activation of the list "
        "is the non-linear one",
        stored=_turned("wi_0.kernel", "wi_1.kernel", "wo.kernel"),
        places=("layers_{layer}.mlp",),
    ),
    Layout(
        name="praxis",
        used_by="praxis",
        stored=(
            _array("ffn_layer1_gate.linear.w", "gate", axes="d h", bias="ffn_layer1_gate.bias.b"),
            _array("ffn_layer1.linear.w", "up", axes="d h", bias="ffn_layer1.bias.b"),
            _array("ffn_layer2.linear.w", "down", axes="h d", bias="ffn_layer2.bias.b"),
        ),
        places=("x_layers_{layer}.ff_layer",),
        beside=("layer_norm.scale", "layer_norm.bias"),
    ),
    Layout(
        name="axlearn",
        used_by="axlearn, where the first activation of the pair is the non-linear one",
        stored=(
            _matrix("linear1_0", "gate", axes="d h"),
            _matrix("linear1_1", "up", axes="d h"),
            _matrix("linear2", "down", axes="h d"),
        ),
        places=("layer{layer}.feed_forward",),
        beside=("norm.scale", "norm.bias"),
    ),
    Layout(
        name="litgpt",
        used_by="litgpt",
        stored=_three("fc_1", "fc_2", "proj"),
        places=H,
        width="intermediate_size",
    ),
    Layout(
        name="nomic",
        used_by="NomicBERT, contrastors",
        stored=_three("fc12", "fc11", "fc2"),
        places=MLP,
        extras=(
            Extra(name="norm.weight", key="hidden_norm.weight"),
            Extra(name="norm.bias", key="hidden_norm.bias"),
        ),
        activation=("activation_function", "hidden_act"),
        width="n_inner",
        architectures=("NomicBertModel",),
    ),
    Layout(
        name="boltz",
        used_by="Boltz",
        stored=_three("fc1", "fc2", "fc3"),
        places=("layers.{layer}.transition", "layers.{layer}.transition_s"),
        beside=("norm.weight", "norm.bias"),
        variants=("swiglu",),
    ),
    Layout(
        name="dots-vision",
        used_by="the vision tower of dots3",
        stored=_three("fc1", "fc3", "fc2"),
        places=BLOCKS,
        variants=("swiglu",),
    ),
    Layout(
        name="stripedhyena",
        used_by="StripedHyena",
        stored=_three("l1", "l2", "l3"),
        places=BLOCKS,
        activation=("mlp_activation",),
        variants=("swiglu", "geglu"),
    ),
    Layout(
        name="auraflow",
        used_by="AuraFlow in diffusers",
        stored=_three("linear_1", "linear_2", "out_projection"),
        places=(
            "joint_transformer_blocks.{layer}.ff",
            "joint_transformer_blocks.{layer}.ff_context",
            "single_transformer_blocks.{layer}.ff",
        ),
        variants=("swiglu",),
    ),
    Layout(
        name="lumina",
        used_by="Lumina in diffusers",
        stored=_three("linear_1", "linear_3", "linear_2"),
        places=FEED_FORWARD,
        variants=("swiglu",),
    ),
    Layout(
        name="minimax-audio",
        used_by="the audio autoencoder of MiniMax-H3 in diffusers",
        stored=_three("w0", "w1", "w2"),
        places=MLP,
        variants=("geglu_tanh",),
    ),
    Layout(
        name="cpm-ant",
        used_by="HF CPM-Ant",
        stored=_three("w_in.w_0", "w_in.w_1", "w_out"),
        places=("layers.{layer}.ffn.ffn",),
        variants=("geglu",),
        width="dim_ff",
        architectures=("CpmAntForCausalLM",),
    ),
    Layout(
        name="ernie-image",
        used_by="ERNIE-Image in diffusers",
        stored=_three("gate_proj", "up_proj", "linear_fc2"),
        places=("layers.{layer}.mlp", "blocks.{layer}.mlp"),
        variants=("geglu",),
    ),
    Layout(
        name="qwen-image",
        used_by="Qwen-Image 2.1 in diffusers",
        stored=_three("gate_layer", "proj", "out"),
        places=("blocks.{layer}.mlp", "transformer_blocks.{layer}.mlp"),
        variants=("swiglu",),
    ),
    Layout(
        name="exaone3",
        used_by="EXAONE 3",
        stored=_three("c_fc_0", "c_fc_1", "c_proj"),
        places=H,
        activation=("activation_function",),
        width="intermediate_size",
        architectures=("ExaoneForCausalLM",),
    ),
    Layout(
        name="jais",
        used_by="JAIS, which computes c_fc(x) silu(c_fc2(x))",
        stored=(
            _matrix("c_fc2", "gate", axes="d h"),
            _matrix("c_fc", "up", axes="d h"),
            _matrix("c_proj", "down", axes="h d"),
        ),
        places=H,
        variants=("swiglu",),
        architectures=("JAISLMHeadModel",),
    ),
    Layout(
        name="refact",
        used_by="Refact",
        stored=_three("linear_1", "linear_3", "c_proj"),
        places=H,
        variants=("swiglu",),
    ),
    Layout(
        name="llada",
        used_by="LLaDA, whose ff_proj is the gate alone",
        stored=_three("ff_proj", "up_proj", "ff_out"),
        places=("blocks.{layer}",),
        alone=False,
        activation=("activation_type",),
        width="mlp_hidden_size",
        architectures=("LLaDAModelLM",),
    ),
    Layout(
        name="llama4-original-shared",
        used_by="Llama 4 as published: the shared expert, whose w_swiglu is the up projection",
        stored=(
            _matrix("w_in_shared_FD", "gate", bias=NO_BIAS),
            _matrix("w_swiglu_FD", "up", bias=NO_BIAS),
            _matrix("w_out_shared_DF", "down", bias=NO_BIAS),
        ),
        places=FEED_FORWARD,
        alone=False,
        variants=("swiglu",),
    ),
    Layout(
        name="keras-llama",
        used_by="KerasHub Llama",
        stored=_turned(
            "_feedforward_gate_dense.kernel",
            "_feedforward_intermediate_dense.kernel",
            "_feedforward_output_dense.kernel",
        ),
        places=("transformer_layer_{layer}",),
        alone=False,
        variants=("swiglu",),
    ),
    Layout(
        name="keras-gemma",
        used_by="KerasHub Gemma",
        stored=_turned("ffw_gating.kernel", "ffw_gating_2.kernel", "ffw_linear.kernel"),
        places=("decoder_block_{layer}",),
        alone=False,
        variants=("geglu_tanh",),
    ),
    Layout(
        name="gguf",
        used_by="the names of GGUF, llama.cpp",
        stored=_three("ffn_gate", "ffn_up", "ffn_down"),
        places=("blk.{layer}",),
        alone=False,
    ),
    Layout(
        name="timm-swiglu",
        used_by="timm SwiGLU (EVA-02 L and others)",
        stored=_three("fc1_g", "fc1_x", "fc2"),
        places=BLOCKS,
        extras=(
            Extra(name="norm.weight", key="hidden_norm.weight"),
            Extra(name="norm.bias", key="hidden_norm.bias"),
        ),
        variants=("swiglu",),
    ),
    Layout(
        name="fastertransformer",
        used_by="FasterTransformer",
        stored=(
            _array("intermediate_weight", "gate", axes="d h", bias="intermediate_bias"),
            _array("intermediate_weight2", "up", axes="d h", bias="intermediate_bias2"),
            _array("output_weight", "down", axes="h d", bias="output_bias"),
        ),
        places=("layers.{layer}.ffn",),
        variants=("geglu_tanh", "reglu", "swiglu"),
    ),
    Layout(
        name="nemo",
        used_by="NeMo T5 and GPT of old, geglu, reglu and swiglu without fast-",
        stored=_three("dense_h_to_4h", "dense_h_to_4h_2", "dense_4h_to_h"),
        places=MLP,
        width="ffn_hidden_size",
    ),
    Layout(
        name="tensorrt-llm",
        used_by="TensorRT-LLM GatedMLP, whose gate is the linear branch",
        stored=_three("fc", "gate", "proj"),
        places=MLP,
    ),
)

PACKED = (
    Layout(
        name="phi3",
        used_by="Phi-3, Phi-4, GLM, GLM-4, Dia, OmniGen, ESMFold2, dots3 audio, ChatGLM's kin",
        stored=_packed("gate_up_proj", "down_proj", GATE_UP),
        places=MLP,
        activation=("hidden_act", "hidden_activation"),
        width="intermediate_size",
        architectures=("Phi3ForCausalLM", "GlmForCausalLM", "Glm4ForCausalLM"),
    ),
    Layout(
        name="phi4-audio",
        used_by="the audio tower of Phi-4 multimodal: up first, whatever its name says",
        stored=_packed("gate_up_proj", "down_proj", UP_GATE),
        places=("encoders.{layer}.feed_forward_in", "encoders.{layer}.feed_forward_out"),
        beside=("layer_norm.weight", "layer_norm.bias"),
        variants=("swiglu",),
    ),
    Layout(
        name="phi3-small",
        used_by="Phi-3-small, gate and up alternating",
        stored=_packed("up_proj", "down_proj", GATE_UP, block=1),
        places=MLP,
        variants=("swiglu_oai",),
        settings={"limit": "gegelu_limit"},
        width="ff_intermediate_size",
        architectures=("Phi3SmallForCausalLM",),
    ),
    Layout(
        name="zamba2",
        used_by="Zamba2",
        stored=_packed("gate_up_proj", "down_proj", GATE_UP),
        places=FEED_FORWARD,
        width="intermediate_size",
        architectures=("Zamba2ForCausalLM",),
        beyond="it adds a LoRA of each invocation to the packed product",
    ),
    Layout(
        name="granite-shared",
        used_by="the shared block of Granite-MoE",
        stored=_packed("input_linear", "output_linear", GATE_UP),
        places=("layers.{layer}.shared_mlp",),
        width="shared_intermediate_size",
        architectures=("GraniteMoeSharedForCausalLM", "GraniteMoeHybridForCausalLM"),
    ),
    Layout(
        name="modernbert",
        used_by="ModernBERT and its decoder, whose code calls the linear half gate",
        stored=_packed("Wi", "Wo", GATE_UP),
        places=MLP,
        activation=("hidden_activation",),
        width="intermediate_size",
        architectures=(
            "ModernBertModel",
            "ModernBertForMaskedLM",
            "ModernBertForSequenceClassification",
            "ModernBertForTokenClassification",
            "ModernBertDecoderForCausalLM",
        ),
    ),
    Layout(
        name="mosaicbert",
        used_by="MosaicBERT, JinaBERT v2",
        stored=(_matrix("gated_layers", *GATE_UP, bias=NO_BIAS), _matrix("wo", "down")),
        places=("layer.{layer}.mlp",),
        beside=("layernorm.weight", "layernorm.bias"),
        activation=("feed_forward_type", "hidden_act"),
        variants=("geglu", "reglu"),
        width="intermediate_size",
    ),
    Layout(
        name="jina-code",
        used_by="JinaBERT v2 code",
        stored=(_matrix("up_gated_layer", *UP_GATE, bias=NO_BIAS), _matrix("down_layer", "down")),
        places=("layer.{layer}.mlp",),
        beside=("layernorm.weight", "layernorm.bias"),
        activation=("feed_forward_type", "hidden_act"),
        variants=("geglu", "reglu"),
    ),
    Layout(
        name="gte",
        used_by="GTE and Snowflake Arctic embed (new-impl)",
        stored=(_matrix("up_gate_proj", *UP_GATE, bias=NO_BIAS), _matrix("down_proj", "down")),
        places=("layer.{layer}.mlp",),
        width="intermediate_size",
        architectures=("NewModel", "GteModel"),
    ),
    Layout(
        name="olmo-original",
        used_by="OLMo 1 as published, Molmo",
        stored=_packed("ff_proj", "ff_out", UP_GATE),
        places=("blocks.{layer}", "blocks.{layer}.mlp"),
        alone=False,
        variants=("swiglu",),
        width="mlp_hidden_size",
        both_halves=True,
        architectures=("OLMoForCausalLM", "MolmoForCausalLM"),
    ),
    Layout(
        name="clvp",
        used_by="CLVP",
        stored=_packed("fc1.proj", "fc2", UP_GATE),
        places=MLP,
        architectures=("ClvpModelForConditionalGeneration",),
    ),
    Layout(
        name="moonshine",
        used_by="the decoder of Moonshine, Mamba's GatedMLP, flash-attn's GatedMlp",
        stored=_packed("fc1", "fc2", UP_GATE),
        places=(*MLP, "layers.{layer}.mixer.mlp"),
        activation=("decoder_hidden_act", "hidden_act", "activation_function"),
    ),
    Layout(
        name="aya-vision",
        used_by="the projectors of Aya Vision, Cohere2 Vision and Ultravox",
        stored=_packed("linear_1", "linear_2", UP_GATE),
        places=("multi_modal_projector",),
        beside=("layernorm.weight", "layernorm.bias", "ln_pre.weight", "ln_mid.weight"),
        variants=("swiglu",),
        width="alignment_intermediate_size",
        both_halves=True,
    ),
    Layout(
        name="moshi",
        used_by="Moshi, Kyutai STT",
        stored=_packed("fc1", "fc2", GATE_UP, bias=NO_BIAS),
        places=MLP,
        width="ffn_dim",
        both_halves=True,
        architectures=("KyutaiSpeechToTextForConditionalGeneration",),
    ),
    Layout(
        name="openelm",
        used_by="OpenELM",
        stored=_packed("proj_1", "proj_2", GATE_UP),
        places=("layers.{layer}.ffn",),
        activation=("activation_fn_name",),
        spellings={"swish": "swiglu"},
        architectures=("OpenELMForCausalLM", "OpenELMModel"),
    ),
    Layout(
        name="esm3",
        used_by="ESM3, ESM C",
        stored=_packed("1", "3", GATE_UP),
        places=("blocks.{layer}.ffn",),
        beside=("0.weight", "0.bias"),
        variants=("swiglu",),
    ),
    Layout(
        name="gpt-neox-gated",
        used_by="GPT-NeoX's gated layer",
        stored=_packed("linear1", "linear2", UP_GATE),
        places=("layers.{layer}.mlp", "{layer}.mlp"),
    ),
    Layout(
        name="palm-rlhf",
        used_by="PaLM-rlhf-pytorch, fused with attention",
        stored=(
            _array("fused_attn_ff_proj.weight", *UP_GATE, axes="+p d"),
            _matrix("ff_out.1", "down", bias=NO_BIAS),
        ),
        places=("layers.{layer}.fn", "layers.{layer}"),
        alone=False,
        variants=("swiglu",),
    ),
    Layout(
        name="x-transformers",
        used_by="x-transformers with glu=True",
        stored=_packed("ff.0.proj", "ff.2", UP_GATE),
        places=("layers.{layer}.1",),
        extras=(Extra(name="ff.0.mult_bias", key="hidden_scale"),),
    ),
    Layout(
        name="diffusers",
        used_by="diffusers GEGLU, Stable Diffusion 1, 2 and XL",
        stored=_packed("net.0.proj", "net.2", UP_GATE),
        places=("transformer_blocks.{layer}.ff", "blocks.{layer}.ff"),
        variants=("geglu",),
    ),
    Layout(
        name="diffusers-swiglu",
        used_by="diffusers SwiGLU",
        stored=_packed("net.0.proj", "net.2", UP_GATE),
        places=("transformer_blocks.{layer}.ff", "blocks.{layer}.ff"),
        variants=("swiglu",),
    ),
    Layout(
        name="stable-audio",
        used_by="Stable Audio 3 in diffusers",
        stored=_packed("proj_in", "proj_out", UP_GATE),
        places=("transformer_blocks.{layer}.ff", "blocks.{layer}.ff"),
        variants=("swiglu",),
    ),
    Layout(
        name="flux2",
        used_by="the double blocks of Flux 2 and 3: gate first, unlike diffusers' SwiGLU",
        stored=_packed("linear_in", "linear_out", GATE_UP),
        places=("transformer_blocks.{layer}.ff", "transformer_blocks.{layer}.ff_context"),
        variants=("swiglu",),
    ),
    Layout(
        name="flux2-single",
        used_by="the single blocks of Flux 2, fused with attention",
        stored=(
            _array("to_qkv_mlp_proj.weight", *GATE_UP, axes="+p d"),
            _array("to_out.weight", "down", axes="d +h"),
        ),
        places=("single_transformer_blocks.{layer}.attn",),
        alone=False,
        variants=("swiglu",),
    ),
    Layout(
        name="xformers",
        used_by="xformers SwiGLU, DINOv2, NeoBERT, Sapiens2, TIPSv2",
        stored=_packed("w12", "w3", GATE_UP),
        places=(*BLOCKS, "blocks.{n}.{layer}.mlp", "transformer_encoder.{layer}.ffn"),
        variants=("swiglu",),
        architectures=("NeoBERT", "NeoBERTLMHead"),
    ),
    Layout(
        name="dinov2-hf",
        used_by="HF DINOv2 with use_swiglu_ffn, KerasHub DINOv2",
        stored=_packed("weights_in", "weights_out", GATE_UP),
        places=("layer.{layer}.mlp",),
        variants=("swiglu",),
        architectures=("Dinov2Model", "Dinov2ForImageClassification"),
    ),
    Layout(
        name="timm-glu",
        used_by="timm GluMlp as it is by default: the gate is the second half, sigmoid",
        stored=_packed("fc1", "fc2", UP_GATE),
        places=BLOCKS,
        extras=(
            Extra(name="norm.weight", key="hidden_norm.weight"),
            Extra(name="norm.bias", key="hidden_norm.bias"),
        ),
        variants=("glu",),
        width="hidden_features",
        both_halves=True,
    ),
    Layout(
        name="timm-swiglu-packed",
        used_by="timm SwiGLUPacked, EVA and DINOv2-g in timm, DeepSeek-ViT",
        stored=_packed("fc1", "fc2", GATE_UP),
        places=BLOCKS,
        extras=(
            Extra(name="norm.weight", key="hidden_norm.weight"),
            Extra(name="norm.bias", key="hidden_norm.bias"),
        ),
        variants=("swiglu",),
        width="hidden_features",
        both_halves=True,
    ),
    Layout(
        name="gemma-original",
        used_by="Gemma as published (JAX), PaliGemma in big_vision",
        stored=(
            _array("gating_einsum", *GATE_UP, axes="2 d h"),
            _array("linear", "down", axes="h d"),
        ),
        places=("layer_{layer}.mlp",),
        variants=("geglu_tanh",),
    ),
    Layout(
        name="gemma-original-transposed",
        used_by="Gemma as published with transpose_gating_einsum",
        stored=(
            _array("gating_einsum", *GATE_UP, axes="2 h d"),
            _array("linear", "down", axes="h d"),
        ),
        places=("layer_{layer}.mlp",),
        variants=("geglu_tanh",),
    ),
    Layout(
        name="recurrent-gemma-original",
        used_by="RecurrentGemma as published",
        stored=(
            _array("ffw_up.w", *GATE_UP, axes="2 d h", bias="ffw_up.b", bias_axes="2 1 1 h"),
            _matrix("ffw_down.kernel", "down", axes="h d"),
        ),
        places=("blocks.{layer}.mlp_block",),
        variants=("geglu_tanh",),
    ),
    Layout(
        name="t5x-fused",
        used_by="flaxformer wi_fused, where the first activation is the non-linear one",
        stored=(
            _array("wi_fused.kernel", *GATE_UP, axes="d 2 h"),
            _array("wo.kernel", "down", axes="h d"),
        ),
        places=("layers_{layer}.mlp",),
    ),
    Layout(
        name="maxtext-fused",
        used_by="MaxText fused_mlp",
        stored=(
            _array("wi.kernel", *GATE_UP, axes="d 2 h"),
            _array("wo.kernel", "down", axes="h d"),
        ),
        places=("layers_{layer}.mlp",),
    ),
    Layout(
        name="te-jax",
        used_by="TransformerEngine for JAX, LayerNormMLP",
        stored=(
            _array("wi_kernel", *GATE_UP, axes="d 2 h", bias="wi_bias", bias_axes="2 h"),
            _array("wo_kernel", "down", axes="h d", bias="wo_bias"),
        ),
        places=("layers_{layer}.mlp",),
        beside=("scale", "ln_bias"),
    ),
    Layout(
        name="alphafold3",
        used_by="AlphaFold 3",
        stored=(
            _array("transition1.weights", *GATE_UP, axes="d p"),
            _array("transition2.weights", "down", axes="h d"),
        ),
        places=("layer_{layer}.transition",),
        beside=("input_layer_norm.scale", "input_layer_norm.offset"),
        variants=("swiglu",),
    ),
    Layout(
        name="torchtitan-fused",
        used_by="torchtitan's FusedSwiGLU",
        stored=(
            _array("w13", *GATE_UP, axes="h 2 d"),
            _matrix("w2", "down", bias=NO_BIAS),
        ),
        places=FEED_FORWARD,
        variants=("swiglu",),
    ),
    Layout(
        name="quack",
        used_by="quack's MLP as it is by default: gate and up alternate",
        stored=_packed("fc1", "fc2", GATE_UP, block=1),
        places=MLP,
        variants=("swiglu", "swiglu_oai", "reglu", "geglu_tanh", "glu"),
    ),
    Layout(
        name="quack-concat",
        used_by="quack's MLP with concat_layout=True",
        stored=_packed("fc1", "fc2", GATE_UP),
        places=MLP,
        variants=("swiglu", "swiglu_oai", "reglu", "geglu_tanh", "glu"),
    ),
    Layout(
        name="megatron",
        used_by="Megatron Core, NeMo, Megatron-Bridge: each rank holds its gate rows, then its up "
        "rows",
        stored=_packed("linear_fc1", "linear_fc2", GATE_UP),
        places=MLP,
        beside=("linear_fc1.layer_norm_weight", "linear_fc1.layer_norm_bias"),
        per_rank=True,
        width="ffn_hidden_size",
    ),
    Layout(
        name="megatron-interleaved-32",
        used_by="Megatron Core with moe_mlp_glu_interleave_size = 32",
        stored=_packed("linear_fc1", "linear_fc2", GATE_UP, block=32),
        places=MLP,
        beside=("linear_fc1.layer_norm_weight", "linear_fc1.layer_norm_bias"),
        per_rank=True,
        width="ffn_hidden_size",
    ),
    Layout(
        name="transformer-engine",
        used_by="TransformerEngine LayerNormMLP",
        stored=(
            _array("fc1_weight", *GATE_UP, axes="p d", bias="fc1_bias"),
            _array("fc2_weight", "down", axes="d h", bias="fc2_bias"),
        ),
        places=MLP,
        beside=("layer_norm_weight", "layer_norm_bias"),
        per_rank=True,
    ),
    Layout(
        name="transformer-engine-interleaved-32",
        used_by="TransformerEngine with glu_interleave_size = 32",
        stored=(
            _array("fc1_weight", *GATE_UP, axes="p d", bias="fc1_bias", block=32),
            _array("fc2_weight", "down", axes="d h", bias="fc2_bias"),
        ),
        places=MLP,
        beside=("layer_norm_weight", "layer_norm_bias"),
        per_rank=True,
    ),
    Layout(
        name="vllm",
        used_by="vLLM and SGLang in memory, SiluAndMul and GeluAndMul",
        stored=_packed("gate_up_proj", "down_proj", GATE_UP),
        places=MLP,
        per_rank=True,
    ),
    Layout(
        name="vllm-mul-and-silu",
        used_by="vLLM in memory, MulAndSilu: Molmo, Molmo2, Ultravox, Cohere2 Vision",
        stored=_packed("gate_up_proj", "down_proj", UP_GATE),
        places=MLP,
        per_rank=True,
        variants=("swiglu",),
    ),
    Layout(
        name="tensorrt-llm-fused",
        used_by="TensorRT-LLM FusedGatedMLP: the activated half is last",
        stored=_packed("fused_fc", "proj", UP_GATE),
        places=MLP,
        per_rank=True,
    ),
    Layout(
        name="gguf-packed",
        used_by="GGUF of packed models (Phi-3, GLM-4, ModernBERT, Jina, PLaMo2, NeoBERT): ffn_up "
        "holds both",
        stored=_packed("ffn_up", "ffn_down", GATE_UP),
        places=("blk.{layer}",),
        alone=False,
    ),
    Layout(
        name="chatglm",
        used_by="ChatGLM",
        stored=_packed("dense_h_to_4h", "dense_4h_to_h", GATE_UP),
        places=MLP,
        variants=("swiglu",),
        width="ffn_hidden_size",
        architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    ),
    Layout(
        name="llama4-original",
        used_by="Llama 4 as published: the dense layers",
        stored=(
            _array("fc1_weight", *GATE_UP, axes="p d"),
            _array("fc2_weight", "down", axes="d h"),
        ),
        places=("layers.{layer}.feed_forward.mlp",),
        beside=("layer_norm_weight",),
        variants=("swiglu",),
    ),
)

UNGATED = (
    Layout(
        name="bert",
        used_by="BERT, RoBERTa, ESM-2, HF ViT and kin",
        stored=_two("intermediate.dense", "output.dense"),
        places=("layer.{layer}",),
        alone=False,
        width="intermediate_size",
        architectures=(
            "BertModel",
            "BertForMaskedLM",
            "RobertaModel",
            "RobertaForMaskedLM",
            "EsmForMaskedLM",
            "ViTModel",
            "ViTForImageClassification",
        ),
    ),
    Layout(
        name="fc",
        used_by="OPT, Whisper, BART, CLIP, SigLIP, Phi-1 and 2, timm's Mlp and others",
        stored=_two("fc1", "fc2"),
        places=("layers.{layer}", *MLP, *BLOCKS, "layer.{layer}.mlp"),
        alone=False,
        activation=("activation_function", "hidden_act"),
        architectures=(
            "OPTForCausalLM",
            "PhiForCausalLM",
            "WhisperForConditionalGeneration",
            "BartForConditionalGeneration",
            "Dinov2Model",
            "Dinov2ForImageClassification",
        ),
    ),
    Layout(
        name="gpt2",
        used_by="GPT-2, OpenAI GPT, ImageGPT, Decision Transformer: Conv1D, stored (in, out)",
        stored=(_matrix("c_fc", "up", axes="d h"), _matrix("c_proj", "down", axes="h d")),
        places=H,
        activation=("activation_function", "afn"),
        width="n_inner",
        architectures=("GPT2LMHeadModel", "GPT2Model", "OpenAIGPTLMHeadModel"),
    ),
    Layout(
        name="starcoder2",
        used_by="GPTBigCode, StarCoder2, nanochat, modded-nanogpt of old, OpenAI CLIP",
        stored=_two("c_fc", "c_proj"),
        places=(*MLP, *H, "resblocks.{layer}.mlp"),
        activation=("hidden_act", "activation_function"),
        architectures=("Starcoder2ForCausalLM", "GPTBigCodeForCausalLM"),
    ),
    Layout(
        name="modded-nanogpt",
        used_by="modded-nanogpt: one bank, whose layers are taken for experts here",
        stored=(_array("mlp_bank", "up", "down", axes="e 2 h d"),),
        places=("",),
        alone=False,
        variants=("relu2",),
    ),
    Layout(
        name="neox",
        used_by="GPT-NeoX, Falcon, BLOOM, Persimmon",
        stored=_two("dense_h_to_4h", "dense_4h_to_h"),
        places=(*MLP, *H),
        activation=("hidden_act", "activation"),
        architectures=(
            "GPTNeoXForCausalLM",
            "FalconForCausalLM",
            "BloomForCausalLM",
            "PersimmonForCausalLM",
        ),
    ),
    Layout(
        name="gptj",
        used_by="GPT-J, CodeGen",
        stored=_two("fc_in", "fc_out"),
        places=H,
        activation=("activation_function",),
        width="n_inner",
        architectures=("GPTJForCausalLM", "CodeGenForCausalLM"),
    ),
    Layout(
        name="xlnet",
        used_by="XLNet",
        stored=_two("layer_1", "layer_2"),
        places=("layer.{layer}.ff",),
        beside=("layer_norm.weight", "layer_norm.bias"),
        activation=("ff_activation",),
        width="d_inner",
        architectures=("XLNetLMHeadModel", "XLNetModel"),
    ),
    Layout(
        name="distilbert",
        used_by="DistilBERT",
        stored=_two("lin1", "lin2"),
        places=("layer.{layer}.ffn",),
        activation=("activation",),
        width="hidden_dim",
        architectures=("DistilBertModel", "DistilBertForMaskedLM"),
    ),
    Layout(
        name="bark",
        used_by="Bark",
        stored=_two("in_proj", "out_proj"),
        places=("layers.{layer}.mlp",),
        variants=("gelu",),
    ),
    Layout(
        name="up-down",
        used_by="MPT, Nemotron, Arcee, Jais2",
        stored=_two("up_proj", "down_proj"),
        places=(*MLP, "blocks.{layer}.ffn"),
        activation=("hidden_act",),
        architectures=("NemotronForCausalLM", "ArceeForCausalLM"),
    ),
    Layout(
        name="apertus",
        used_by="Apertus, with learned parameters of xIELU",
        stored=_two("up_proj", "down_proj"),
        places=MLP,
        extras=(
            Extra(name="act_fn.alpha_p", key="alpha_p", axes="1"),
            Extra(name="act_fn.alpha_n", key="alpha_n", axes="1"),
            Extra(name="act_fn.beta", key="xielu_beta", axes=""),
            Extra(name="act_fn.eps", key="xielu_eps", axes=""),
        ),
        variants=("xielu",),
        width="intermediate_size",
        architectures=("ApertusForCausalLM",),
    ),
    Layout(
        name="t5-ungated",
        used_by="T5 v1.0, Switch",
        stored=_two("wi", "wo", bias=NO_BIAS),
        places=("block.{layer}.layer.{n}.DenseReluDense", "block.{layer}.layer.{n}.mlp"),
        activation=("feed_forward_proj", "dense_act_fn"),
        width="d_ff",
        architectures=(
            "T5ForConditionalGeneration",
            "T5EncoderModel",
            "MT5ForConditionalGeneration",
            "UMT5ForConditionalGeneration",
            "LongT5ForConditionalGeneration",
        ),
    ),
    Layout(
        name="t5x-ungated",
        used_by="T5 v1.0 in T5X and flax",
        stored=(
            _matrix("wi.kernel", "up", axes="d h"),
            _matrix("wo.kernel", "down", axes="h d"),
        ),
        places=("layers_{layer}.mlp",),
    ),
    Layout(
        name="rwkv",
        used_by="RWKV's channel mix",
        stored=_two("key", "value", bias=NO_BIAS),
        places=("blocks.{layer}.feed_forward", "blocks.{layer}.ffn"),
        beside=("receptance.weight", "time_mix_key", "time_mix_receptance"),
        variants=("relu2",),
        architectures=("RwkvForCausalLM",),
        beyond="it multiplies the output by a gate of the input (receptance)",
    ),
    Layout(
        name="timesfm",
        used_by="TimesFM, which has no gate, whatever the name says",
        stored=_two("gate_proj", "down_proj"),
        places=MLP,
        beside=("layer_norm.weight", "layer_norm.bias"),
        variants=("relu",),
        architectures=("TimesFmModelForPrediction",),
    ),
    Layout(
        name="qwen3-vl-vision",
        used_by="the vision tower of Qwen3-VL",
        stored=_two("linear_fc1", "linear_fc2"),
        places=BLOCKS,
        variants=("gelu_tanh",),
    ),
    Layout(
        name="flux1",
        used_by="the double blocks of Flux 1",
        stored=_two("0", "2"),
        places=("double_blocks.{layer}.img_mlp", "double_blocks.{layer}.txt_mlp"),
        variants=("gelu_tanh",),
    ),
    Layout(
        name="flux1-single",
        used_by="the single blocks of Flux 1, fused with attention",
        stored=(
            _array("linear1.weight", "up", axes="+h d", bias="linear1.bias", bias_axes="+h"),
            _array("linear2.weight", "down", axes="d +h", bias="linear2.bias", bias_axes="d"),
        ),
        places=("single_blocks.{layer}",),
        alone=False,
        variants=("gelu_tanh",),
    ),
    Layout(
        name="conformer",
        used_by="Wav2Vec2-Conformer, Seamless",
        stored=_two("intermediate_dense", "output_dense"),
        places=("layers.{layer}.ffn1", "layers.{layer}.ffn2", "layers.{layer}.feed_forward"),
        variants=("swish",),
    ),
    Layout(
        name="gemma-audio",
        used_by="the audio tower of Gemma 3n and 4",
        stored=_two("ffw_layer_1", "ffw_layer_2"),
        places=("conformer.{layer}.ffw_layer_start", "conformer.{layer}.ffw_layer_end"),
        beside=("pre_layer_norm.weight", "post_layer_norm.weight"),
        variants=("swish",),
        beyond="it clips its input and halves its output",
    ),
)

EXPERT = (
    Layout(
        name="mixtral",
        used_by="Mixtral's files, MiniMax, the native names of DeepSeek",
        stored=_three("{expert}.w1", "{expert}.w3", "{expert}.w2", bias=NO_BIAS),
        places=("layers.{layer}.block_sparse_moe.experts", "layers.{layer}.ffn.experts"),
        architectures=("MixtralForCausalLM",),
    ),
    Layout(
        name="experts-separate",
        used_by="the files of Qwen 2 and 3 MoE, DeepSeek V2 and V3, OLMoE, GLM-4 MoE",
        stored=_three(
            "{expert}.gate_proj", "{expert}.up_proj", "{expert}.down_proj", bias=NO_BIAS
        ),
        places=EXPERTS,
        width="moe_intermediate_size",
        architectures=(
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "OlmoeForCausalLM",
            "Glm4MoeForCausalLM",
        ),
    ),
    Layout(
        name="experts-packed",
        used_by="transformers 5: Mixtral, Qwen MoE, DeepSeek, OLMoE, GLM-4 MoE, MiniMax, Jamba",
        stored=_experts("gate_up_proj", "down_proj", GATE_UP),
        places=(*EXPERTS, "layers.{layer}.feed_forward.experts"),
        architectures=("Qwen3VLMoeForConditionalGeneration",),
    ),
    Layout(
        name="deepseek-v4",
        used_by="DeepSeek V4, GLM-5-next, Hunyuan V4 in transformers 5, with a clamp",
        stored=_experts("gate_up_proj", "down_proj", GATE_UP),
        places=EXPERTS,
        variants=("swiglu_clamp",),
        settings={"limit": "swiglu_limit"},
    ),
    Layout(
        name="minimax-m3",
        used_by="MiniMax M3 in transformers 5",
        stored=_experts("gate_up_proj", "down_proj", GATE_UP),
        places=EXPERTS,
        variants=("swiglu_oai",),
        settings={"limit": "swiglu_limit", "beta": "swiglu_alpha"},
    ),
    Layout(
        name="kimi-k3",
        used_by="Kimi K3",
        stored=_three("{expert}.w1", "{expert}.w3", "{expert}.w2", bias=NO_BIAS),
        places=("layers.{layer}.block_sparse_moe.experts", *EXPERTS),
        variants=("situ_glu",),
    ),
    Layout(
        name="inkling",
        used_by="the files of Inkling 2: gate and up alternate",
        stored=_experts("w13_weight", "w2_weight", GATE_UP, block=1),
        places=EXPERTS,
        variants=("situ_glu",),
    ),
    Layout(
        name="step",
        used_by="Step 3.5 and 3.7",
        stored=_stacked("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
        places=("layers.{layer}.moe",),
        beside=("gate.weight", "router_bias"),
        beyond="it clamps after the activation, with a limit of each layer",
    ),
    Layout(
        name="gpt-oss-original",
        used_by="gpt-oss as published in bfloat16: gate and up rows alternate",
        stored=(
            _array(
                "mlp1_weight",
                *GATE_UP,
                axes="e p d",
                bias="mlp1_bias",
                block=1,
                needs_bias=True,
            ),
            _array("mlp2_weight", "down", axes="e d h", bias="mlp2_bias", needs_bias=True),
        ),
        places=("block.{layer}.mlp",),
        beside=("gate.weight", "gate.bias", "norm.scale"),
        variants=("swiglu_oai",),
        settings={"limit": "swiglu_limit"},
    ),
    Layout(
        name="gpt-oss",
        used_by="gpt-oss in transformers, bfloat16: stored (in, out), columns alternate",
        stored=(
            _array(
                "gate_up_proj",
                *GATE_UP,
                axes="e d p",
                bias="gate_up_proj_bias",
                block=1,
                needs_bias=True,
            ),
            _array("down_proj", "down", axes="e h d", bias="down_proj_bias", needs_bias=True),
        ),
        places=EXPERTS,
        variants=("swiglu_oai",),
        settings={"limit": "swiglu_limit"},
        width="intermediate_size",
        architectures=("GptOssForCausalLM",),
    ),
    Layout(
        name="privacy-filter",
        used_by="OpenAI's privacy filter: gpt-oss's names, but gate first",
        stored=(
            _array(
                "gate_up_proj", *GATE_UP, axes="e d p", bias="gate_up_proj_bias", needs_bias=True
            ),
            _array("down_proj", "down", axes="e h d", bias="down_proj_bias", needs_bias=True),
        ),
        places=EXPERTS,
        variants=("swiglu_oai",),
        settings={"limit": "swiglu_limit"},
        architectures=("OpenAIPrivacyFilterForTokenClassification",),
        beyond="it multiplies the output by the number of experts",
    ),
    Layout(
        name="llama4",
        used_by="the experts of Llama 4 in transformers: stored (in, out)",
        stored=_experts("gate_up_proj", "down_proj", GATE_UP, "e d p", "e h d"),
        places=("layers.{layer}.feed_forward.experts",),
        variants=("swiglu",),
        architectures=("Llama4ForConditionalGeneration",),
    ),
    Layout(
        name="llama4-original-experts",
        used_by="Llama 4 as published: flattened, stored (in, out); swiglu is the up projection",
        stored=(
            _array("moe_w_in_eD_F", "gate", axes="ed h"),
            _array("moe_w_swiglu_eD_F", "up", axes="ed h"),
            _array("moe_w_out_eF_D", "down", axes="eh d"),
        ),
        places=("layers.{layer}.feed_forward.experts",),
        variants=("swiglu",),
    ),
    Layout(
        name="qwen3-vl-moe",
        used_by="the files of Qwen3-VL MoE, and transformers 4: stored (in, out)",
        stored=_experts("gate_up_proj", "down_proj", GATE_UP, "e d p", "e h d"),
        places=EXPERTS,
        variants=("swiglu",),
        architectures=("Qwen3VLMoeForConditionalGeneration",),
    ),
    Layout(
        name="aria",
        used_by="the experts of Aria: stored (in, out)",
        stored=_experts("fc1.weight", "fc2.weight", GATE_UP, "e d p", "e h d"),
        places=EXPERTS,
        variants=("swiglu",),
    ),
    Layout(
        name="dbrx",
        used_by="DBRX, MegaBlocks: flattened, the down projection stored (in, out)",
        stored=(
            _array("w1", "gate", axes="eh d"),
            _array("v1", "up", axes="eh d"),
            _array("w2", "down", axes="eh d"),
        ),
        places=("blocks.{layer}.ffn.experts.mlp", "layers.{layer}.ffn.experts.mlp"),
        experts="moe_num_experts",
        architectures=("DbrxForCausalLM",),
    ),
    Layout(
        name="granite-moe",
        used_by="Granite-MoE, JetMoE",
        stored=_experts("input_linear.weight", "output_linear.weight", GATE_UP),
        places=("layers.{layer}.block_sparse_moe", "layers.{layer}.mlp"),
        beside=("router.layer.weight", "bias"),
        activation=("hidden_act", "activation_function"),
        architectures=("GraniteMoeForCausalLM", "JetMoeForCausalLM"),
    ),
    Layout(
        name="nemotron-h",
        used_by="the experts of Nemotron-H, without a gate",
        stored=(
            _array("up_proj", "up", axes="e h d"),
            _array("down_proj", "down", axes="e d h"),
        ),
        places=("layers.{layer}.mixer.experts",),
        variants=("relu2",),
    ),
    Layout(
        name="torchtitan-experts",
        used_by="torchtitan",
        stored=_stacked("w1_EFD", "w3_EFD", "w2_EDF"),
        places=("layers.{layer}.moe.experts",),
        variants=("swiglu",),
    ),
    Layout(
        name="torchtitan-gpt-oss",
        used_by="torchtitan's gpt-oss: gate and up alternate",
        stored=(
            _array("mlp1_weight_EGD", *GATE_UP, axes="e p d", bias="mlp1_bias_EG", block=1),
            _array("mlp2_weight_EDF", "down", axes="e d h", bias="mlp2_bias_ED"),
        ),
        places=("layers.{layer}.moe.experts",),
        variants=("swiglu_oai",),
    ),
    Layout(
        name="maxtext-experts",
        used_by="MaxText: stored (in, out)",
        stored=_stacked("wi_0", "wi_1", "wo", "e d h", "e h d"),
        places=("layers_{layer}.MoeBlock_0",),
        beside=("gate.kernel",),
    ),
    Layout(
        name="maxtext-experts-fused",
        used_by="MaxText with prefuse_moe_weights: stored (in, out)",
        stored=_experts("wi", "wo", GATE_UP, "e d p", "e h d"),
        places=("layers_{layer}.MoeBlock_0",),
        beside=("gate.kernel",),
    ),
    Layout(
        name="praxis-experts",
        used_by="praxis: stored (in, out)",
        stored=_stacked("wi_gate_0", "wi_0", "wo_0", "e d h", "e h d"),
        places=("x_layers_{layer}.ff_layer",),
        beside=("gate", "layer_norm.scale", "layer_norm.bias"),
    ),
    Layout(
        name="grok1",
        used_by="Grok 1: stored (in, out)",
        stored=_stacked("linear.w", "linear_v.w", "linear_1.w", "e d h", "e h d"),
        places=("decoder_layer_{layer}.moe",),
        variants=("geglu_tanh",),
    ),
    Layout(
        name="olmo-core-experts",
        used_by="OLMo-core, dropless: flattened, the down projection stored (in, out)",
        stored=(
            _array("w1", "gate", axes="eh d"),
            _array("w3", "up", axes="eh d"),
            _array("w2", "down", axes="eh d"),
        ),
        places=("blocks.{layer}.feed_forward_moe.experts.mlp",),
        variants=("swiglu",),
    ),
    Layout(
        name="olmo-core-experts-capacity",
        used_by="OLMo-core with a capacity: stored (in, out)",
        stored=_stacked("w1", "w3", "w2", "e d h", "e h d"),
        places=("blocks.{layer}.feed_forward_moe.experts.mlp",),
        variants=("swiglu",),
    ),
    Layout(
        name="vllm-experts",
        used_by="vLLM and SGLang in memory",
        stored=_experts("w13_weight", "w2_weight", GATE_UP),
        places=EXPERTS,
        per_rank=True,
    ),
    Layout(
        name="vllm-gpt-oss",
        used_by="vLLM's gpt-oss in memory: gate and up alternate",
        stored=(
            _array("w13_weight", *GATE_UP, axes="e p d", bias="w13_bias", block=1),
            _array("w2_weight", "down", axes="e d h", bias="w2_bias"),
        ),
        places=EXPERTS,
        per_rank=True,
        variants=("swiglu_oai",),
    ),
    Layout(
        name="tensorrt-llm-experts",
        used_by="TensorRT-LLM: up first",
        stored=_experts("w3_w1_weight", "w2_weight", UP_GATE),
        places=EXPERTS,
        per_rank=True,
    ),
    Layout(
        name="tensorrt-llm-experts-triton",
        used_by="TensorRT-LLM's Triton backend: up first, stored (in, out)",
        stored=_experts("w3_w1_weight", "w2_weight", UP_GATE, "e d p", "e h d"),
        places=EXPERTS,
        per_rank=True,
    ),
    Layout(
        name="mlx-switch",
        used_by="MLX, SwitchGLU",
        stored=_stacked(
            "gate_proj.weight", "up_proj.weight", "down_proj.weight", "e h d", "e d h"
        ),
        places=("layers.{layer}.mlp.switch_mlp", "layers.{layer}.block_sparse_moe.switch_mlp"),
    ),
    Layout(
        name="gguf-experts",
        used_by="the names of GGUF for experts",
        stored=_stacked(
            "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight", "e h d", "e d h"
        ),
        places=("blk.{layer}",),
        alone=False,
    ),
    Layout(
        name="gguf-experts-packed",
        used_by="the names of GGUF for packed experts",
        stored=_experts("ffn_gate_up_exps.weight", "ffn_down_exps.weight", GATE_UP),
        places=("blk.{layer}",),
        alone=False,
    ),
)

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {row.name: row for row in (*SEPARATE, *PACKED, *UNGATED, *EXPERT)}
)
"""Every layout by name, read-only."""
