"""Packing: every row there and back, the orders written out by hand, and what is refused."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import gatedffn as gf
from gatedffn.errors import LayoutError
from gatedffn.interop.checkpoints.configuration import gated_name
from gatedffn.layouts import LAYOUTS, Layout, get_layout, pack, unpack
from gatedffn.storage.arithmetic import before, positions
from gatedffn.storage.model import PROJECTIONS, Role
from gatedffn.variants import VARIANTS, get_variant

# All different, so that no shape hides a transpose; the hidden width divides by 2 x 32.
D_MODEL, D_HIDDEN, D_OUT, EXPERTS = 6, 64, 10, 3

ROWS = {name: row for name, row in LAYOUTS.items() if not row.fused}
each = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


def block(row: Layout, *, bias: bool = True) -> dict[str, Tensor]:
    """A block in which every number is another, with all that the row has a place for."""
    numbers = itertools.count(1)

    def fresh(*shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        start = next(numbers) * 100_000.0
        return torch.arange(start, start + size, dtype=torch.float64).view(shape)

    front = (EXPERTS,) if row.has_experts else ()
    d_out = D_MODEL if any("2 h d" in s.axes and "down" in s.roles for s in row.stored) else D_OUT
    found = {}
    for stored in row.stored:
        for role in stored.roles:
            shape = (d_out, D_HIDDEN) if role == "down" else (D_HIDDEN, D_MODEL)
            found[f"{PROJECTIONS[role]}.weight"] = fresh(*front, *shape)
            if stored.bias is not None and bias:
                found[f"{PROJECTIONS[role]}.bias"] = fresh(*front, shape[0])
    for extra in row.extras:
        found[extra.key] = fresh(*([D_HIDDEN] if extra.axes == "h" else [1] * bool(extra.axes)))
    return found


def back(tensors: dict[str, Tensor], row: Layout, **settings: int) -> dict[str, Tensor]:
    return unpack(tensors, row, experts=EXPERTS if row.has_experts else None, **settings)


@each
def test_there_and_back(row: Layout) -> None:
    weights = block(row)
    stored = pack(weights, row)
    assert all(tensor.is_contiguous() for tensor in stored.values())
    again = back(stored, row)
    assert again.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(again[key], tensor), key
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in weights.values())


GATED = {name: row for name, row in ROWS.items() if row.gated}


@pytest.mark.parametrize("row", GATED.values(), ids=list(GATED))
def test_a_swap_of_gate_and_up_shows(row: Layout) -> None:
    other: dict[Role, Role] = {"gate": "up", "up": "gate", "down": "down"}
    swapped = dataclasses.replace(
        row,
        stored=tuple(
            dataclasses.replace(s, roles=tuple(other[role] for role in s.roles)) for s in row.stored
        ),
    )
    weights = block(row)
    wrong = back(pack(weights, row), swapped)
    assert torch.equal(wrong["gate_proj.weight"], weights["up_proj.weight"])
    assert not torch.equal(wrong["gate_proj.weight"], weights["gate_proj.weight"])


@each
def test_nothing_of_a_block_may_be_missing_or_left(row: Layout) -> None:
    stored = pack(block(row), row)
    optional = {extra.name for extra in row.extras}
    optional |= {s.bias for s in row.stored if s.bias and not s.needs_bias}
    for name in stored:
        if name in optional:
            continue
        some = {n: t for n, t in stored.items() if n != name}
        with pytest.raises(LayoutError, match=r"missing|some miss|no bias"):
            back(some, row)
    with pytest.raises(LayoutError, match="stranger"):
        back({**stored, "stranger": torch.zeros(1)}, row)


@each
def test_the_facts_are_sound(row: Layout) -> None:
    assert row.used_by
    assert row.places
    assert sorted(row.roles) == (["down", "gate", "up"] if row.gated else ["down", "up"])
    for name in row.variants:
        assert VARIANTS[name].gated == row.gated
    for name in row.spellings.values():
        assert VARIANTS[name].gated == row.gated
    for parameter in row.settings:
        assert parameter in VARIANTS[row.variants[0]].defaults


def rows_of(gate: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The orders of rows, each written out another way than the library has it."""
    alternate = [t for pair in zip(gate, up, strict=True) for t in pair]
    blocks = [t for pair in zip(gate.chunk(2), up.chunk(2), strict=True) for t in pair]
    ranks = [t for pair in zip(gate.chunk(4), up.chunk(4), strict=True) for t in pair]
    return {
        "gate_up": torch.cat([gate, up]),
        "up_gate": torch.cat([up, gate]),
        "alternate": torch.stack(alternate),
        "blocks": torch.cat(blocks),
        "ranks": torch.cat(ranks),
    }


# What conventions say of each, name by name: layout, stored name, order of rows.
ORDERS = [
    ("phi3", "gate_up_proj.weight", "gate_up"),
    ("phi4-audio", "gate_up_proj.weight", "up_gate"),
    ("phi3-small", "up_proj.weight", "alternate"),
    ("granite-shared", "input_linear.weight", "gate_up"),
    ("modernbert", "Wi.weight", "gate_up"),
    ("mosaicbert", "gated_layers.weight", "gate_up"),
    ("jina-code", "up_gated_layer.weight", "up_gate"),
    ("gte", "up_gate_proj.weight", "up_gate"),
    ("olmo-original", "ff_proj.weight", "up_gate"),
    ("clvp", "fc1.proj.weight", "up_gate"),
    ("moonshine", "fc1.weight", "up_gate"),
    ("aya-vision", "linear_1.weight", "up_gate"),
    ("moshi", "fc1.weight", "gate_up"),
    ("openelm", "proj_1.weight", "gate_up"),
    ("esm3", "1.weight", "gate_up"),
    ("gpt-neox-gated", "linear1.weight", "up_gate"),
    ("x-transformers", "ff.0.proj.weight", "up_gate"),
    ("diffusers", "net.0.proj.weight", "up_gate"),
    ("diffusers-swiglu", "net.0.proj.weight", "up_gate"),
    ("stable-audio", "proj_in.weight", "up_gate"),
    ("flux2", "linear_in.weight", "gate_up"),
    ("xformers", "w12.weight", "gate_up"),
    ("dinov2-hf", "weights_in.weight", "gate_up"),
    ("timm-glu", "fc1.weight", "up_gate"),
    ("timm-swiglu-packed", "fc1.weight", "gate_up"),
    ("quack", "fc1.weight", "alternate"),
    ("quack-concat", "fc1.weight", "gate_up"),
    ("megatron", "linear_fc1.weight", "gate_up"),
    ("megatron-interleaved-32", "linear_fc1.weight", "blocks"),
    ("transformer-engine", "fc1_weight", "gate_up"),
    ("transformer-engine-interleaved-32", "fc1_weight", "blocks"),
    ("vllm", "gate_up_proj.weight", "gate_up"),
    ("vllm-mul-and-silu", "gate_up_proj.weight", "up_gate"),
    ("tensorrt-llm-fused", "fused_fc.weight", "up_gate"),
    ("gguf-packed", "ffn_up.weight", "gate_up"),
    ("bilinear-decomposition", "w.weight", "gate_up"),
    ("nemo-packed", "dense_h_to_4h.weight", "gate_up"),
    ("chatglm", "dense_h_to_4h.weight", "gate_up"),
    ("llama4-original", "fc1_weight", "gate_up"),
]


@pytest.mark.parametrize(("name", "stored", "order"), ORDERS, ids=[o[0] for o in ORDERS])
def test_the_order_of_a_packed_matrix(name: str, stored: str, order: str) -> None:
    weights = block(LAYOUTS[name])
    packed = pack(weights, name)
    wanted = rows_of(weights["gate_proj.weight"], weights["up_proj.weight"])[order]
    assert torch.equal(packed[stored], wanted)
    if "gate_proj.bias" in weights:
        wanted = rows_of(weights["gate_proj.bias"], weights["up_proj.bias"])[order]
        bias = next(s.bias for s in LAYOUTS[name].stored if s.name == stored)
        assert bias is not None
        assert torch.equal(packed[bias], wanted)


def test_axes_of_their_own_and_other_orientations() -> None:
    def sample(name: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        weights = block(LAYOUTS[name])
        keys = [f"{p}.weight" for p in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = (weights[key] for key in keys)
        return gate, up, down, pack(weights, name)

    gate, up, down, packed = sample("gemma-original")
    assert torch.equal(packed["gating_einsum"], torch.stack([gate.T, up.T]))
    assert torch.equal(packed["linear"], down.T)
    gate, up, down, packed = sample("gemma-original-transposed")
    assert torch.equal(packed["gating_einsum"], torch.stack([gate, up]))
    gate, up, down, packed = sample("torchtitan-fused")
    assert torch.equal(packed["w13"], torch.stack([gate, up], 1))
    for name, stored in (("t5x-fused", "wi_fused.kernel"), ("te-jax", "wi_kernel")):
        gate, up, down, packed = sample(name)
        assert torch.equal(packed[stored], torch.stack([gate.T, up.T], 1))
    gate, up, down, packed = sample("alphafold3")
    assert torch.equal(packed["transition1.weights"], torch.cat([gate.T, up.T], 1))
    gate, up, down, packed = sample("gpt-oss")
    columns = torch.stack([gate.mT, up.mT], -1).flatten(-2)
    assert torch.equal(packed["gate_up_proj"], columns)
    assert torch.equal(packed["down_proj"], down.mT)
    gate, up, down, packed = sample("gpt-oss-original")
    assert torch.equal(packed["mlp1_weight"], torch.stack([gate, up], 2).flatten(1, 2))
    gate, up, down, packed = sample("llama4")
    assert torch.equal(packed["gate_up_proj"], torch.cat([gate.mT, up.mT], -1))
    gate, up, down, packed = sample("experts-packed")
    assert torch.equal(packed["gate_up_proj"], torch.cat([gate, up], 1))
    gate, up, down, packed = sample("tensorrt-llm-experts")
    assert torch.equal(packed["w3_w1_weight"], torch.cat([up, gate], 1))
    gate, up, down, packed = sample("dbrx")
    assert torch.equal(packed["w1"], gate.flatten(0, 1))
    assert torch.equal(packed["w2"], down.mT.flatten(0, 1))
    gate, up, down, packed = sample("llama4-original-experts")
    assert torch.equal(packed["moe_w_in_eD_F"], gate.mT.flatten(0, 1))
    assert torch.equal(packed["moe_w_swiglu_eD_F"], up.mT.flatten(0, 1))
    gate, up, down, packed = sample("mixtral")
    assert torch.equal(packed["2.w3.weight"], up[2])
    gate, up, down, packed = sample("megatron-experts")
    assert torch.equal(packed["linear_fc1.weight2"], torch.cat([gate[2], up[2]]))
    assert torch.equal(packed["linear_fc2.weight2"], down[2])
    gate, up, down, packed = sample("megatron-experts-flat")
    assert packed["weight1"].shape == (D_MODEL, EXPERTS * 2 * D_HIDDEN)
    weight1 = packed["weight1"].view(EXPERTS, D_MODEL, 2 * D_HIDDEN)  # as GroupedMLP reads it
    assert torch.equal(weight1, torch.cat([gate.mT, up.mT], -1))
    assert torch.equal(packed["weight2"].view(EXPERTS, D_HIDDEN, -1), down.mT)
    gate, up, down, packed = sample("jais")
    assert torch.equal(packed["c_fc2.weight"], gate.T)
    bias = block(LAYOUTS["recurrent-gemma-original"])
    packed = pack(bias, "recurrent-gemma-original")
    wanted = torch.stack([bias["gate_proj.bias"], bias["up_proj.bias"]]).view(2, 1, 1, D_HIDDEN)
    assert torch.equal(packed["ffw_up.b"], wanted)
    bank = block(LAYOUTS["modded-nanogpt"])
    packed = pack(bank, "modded-nanogpt")
    assert torch.equal(packed["mlp_bank"][:, 0], bank["up_proj.weight"])
    assert torch.equal(packed["mlp_bank"][:, 1], bank["down_proj.weight"].mT)


# The names that lie, or mean another matrix elsewhere.
NAMES = [
    ("llama-original", "w1.weight", "w3.weight", "w2.weight"),
    ("eva", "w1.weight", "w2.weight", "w3.weight"),
    ("qwen1", "w2.weight", "w1.weight", "c_proj.weight"),
    ("t5", "wi_0.weight", "wi_1.weight", "wo.weight"),
    ("nomic", "fc12.weight", "fc11.weight", "fc2.weight"),
    ("boltz", "fc1.weight", "fc2.weight", "fc3.weight"),
    ("dots-vision", "fc1.weight", "fc3.weight", "fc2.weight"),
    ("auraflow", "linear_1.weight", "linear_2.weight", "out_projection.weight"),
    ("lumina", "linear_1.weight", "linear_3.weight", "linear_2.weight"),
    ("tensorrt-llm", "fc.weight", "gate.weight", "proj.weight"),
    ("timm-swiglu", "fc1_g.weight", "fc1_x.weight", "fc2.weight"),
    ("llada", "ff_proj.weight", "up_proj.weight", "ff_out.weight"),
    (
        "llama4-original-shared",
        "w_in_shared_FD.weight",
        "w_swiglu_FD.weight",
        "w_out_shared_DF.weight",
    ),
    ("exaone3", "c_fc_0.weight", "c_fc_1.weight", "c_proj.weight"),
    ("gguf", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
    ("gguf-shared", "ffn_gate_shexp.weight", "ffn_up_shexp.weight", "ffn_down_shexp.weight"),
]


@pytest.mark.parametrize(("name", "gate", "up", "down"), NAMES, ids=[n[0] for n in NAMES])
def test_which_name_is_which(name: str, gate: str, up: str, down: str) -> None:
    weights = block(LAYOUTS[name])
    stored = pack(weights, name)
    assert torch.equal(stored[gate], weights["gate_proj.weight"])
    assert torch.equal(stored[up], weights["up_proj.weight"])
    assert torch.equal(stored[down], weights["down_proj.weight"])


# Ranks


@pytest.mark.parametrize("name", ["megatron", "vllm", "transformer-engine"])
@pytest.mark.parametrize(("tp", "other"), [(1, 4), (4, 1), (4, 2), (2, 4)])
def test_ranks_hold_their_gate_and_their_up(name: str, tp: int, other: int) -> None:
    row = LAYOUTS[name]
    weights = block(row)
    of_some = pack(weights, row, tp=tp)
    again = unpack(of_some, row, tp=tp)
    of_others = pack(again, row, tp=other)
    gate, up = weights["gate_proj.weight"], weights["up_proj.weight"]
    packed = next(iter(of_others.values()))
    # A plain split of the result gives every rank its own gate rows, then its own up rows.
    for rank, part in enumerate(packed.chunk(other)):
        assert torch.equal(part, torch.cat([gate.chunk(other)[rank], up.chunk(other)[rank]]))
    for key, tensor in weights.items():
        assert torch.equal(unpack(of_others, row, tp=other)[key], tensor)


def test_four_ranks_written_out() -> None:
    weights = block(LAYOUTS["megatron"])
    wanted = rows_of(weights["gate_proj.bias"], weights["up_proj.bias"])["ranks"]
    assert torch.equal(pack(weights, "megatron", tp=4)["linear_fc1.bias"], wanted)


def test_a_plain_split_of_halves_is_refused_with_the_reason() -> None:
    weights = block(LAYOUTS["phi3"])
    with pytest.raises(LayoutError, match=r"first ranks rows of gate only.*megatron or vllm"):
        pack(weights, "phi3", tp=2)
    with pytest.raises(LayoutError, match="first ranks rows of up only"):
        pack(weights, "clvp", tp=2)
    with pytest.raises(LayoutError, match="3 ranks do not divide"):
        pack(weights, "megatron", tp=3)
    with pytest.raises(LayoutError, match=r"blocks of 32.*on each of 4 ranks"):
        pack(weights, "megatron-interleaved-32", tp=4)
    with pytest.raises(LayoutError, match="tp is 0"):
        pack(weights, "megatron", tp=0)
    # What is separate or alternates may be split plainly, and stays as it is.
    for name in ("llama", "quack", "torchtitan-fused"):
        own = block(LAYOUTS[name])
        for key, tensor in pack(own, name, tp=2).items():
            assert torch.equal(tensor, pack(own, name)[key])


# Refusals


def test_what_a_layout_cannot_express_is_refused() -> None:
    gated, ungated = block(LAYOUTS["llama"]), block(LAYOUTS["gpt2"])
    with pytest.raises(LayoutError, match=r"no gate_proj.weight, and layout 'phi3'"):
        pack(ungated, "phi3")
    with pytest.raises(LayoutError, match=r"has gate_proj.weight, and layout 'gpt2'"):
        pack(gated, "gpt2")
    with pytest.raises(LayoutError, match="bias of gate, and layout 't5' has no place"):
        pack(gated, "t5")
    with pytest.raises(LayoutError, match="has no experts, and layout 'mixtral'"):
        pack(block(LAYOUTS["llama"], bias=False), "mixtral")
    with pytest.raises(LayoutError, match="has experts, and layout 'llama'"):
        pack(block(LAYOUTS["mixtral"]), "llama")
    with pytest.raises(LayoutError, match=r"hidden_norm.weight, and layout 'phi3'"):
        pack(block(LAYOUTS["bitnet"]), "phi3")
    with pytest.raises(LayoutError, match="no bias of up"):
        pack({k: t for k, t in gated.items() if k != "up_proj.bias"}, "phi3")
    with pytest.raises(LayoutError, match="shares a matrix with attention"):
        pack(block(LAYOUTS["llama"], bias=False), "palm-rlhf")
    with pytest.raises(LayoutError, match=r"torch.float16, torch.float64"):
        pack({**gated, "up_proj.weight": gated["up_proj.weight"].half()}, "phi3")
    with pytest.raises(LayoutError, match=r"down_proj.bias is \(3,\)"):
        pack({**gated, "down_proj.bias": torch.zeros(3)}, "llama")
    odd = {**block(LAYOUTS["llama"], bias=False)}
    for key in odd:
        odd[key] = odd[key][:33] if key != "down_proj.weight" else odd[key][:, :33]
    with pytest.raises(LayoutError, match="blocks of 32: the hidden width, 33"):
        pack(odd, "megatron-interleaved-32")


def test_shapes_that_do_not_fit_are_told() -> None:
    stored = pack(block(LAYOUTS["phi3"]), "phi3")
    with pytest.raises(LayoutError, match="two halves, so it is even"):
        unpack({**stored, "gate_up_proj.weight": torch.zeros(7, 6)}, "phi3")
    with pytest.raises(LayoutError, match=r"must have 2 axes, \(p, d\)"):
        unpack({**stored, "gate_up_proj.weight": torch.zeros(7)}, "phi3")
    with pytest.raises(LayoutError, match="d_hidden is 4 in the one and 64 in the other"):
        unpack({**stored, "gate_up_proj.weight": torch.zeros(8, 6)}, "phi3")
    with pytest.raises(LayoutError, match=r"gate_up_proj.bias is \(3,\): the other tensors say"):
        unpack({**stored, "gate_up_proj.bias": torch.zeros(3)}, "phi3")
    with pytest.raises(LayoutError, match="it is empty"):
        unpack({**stored, "gate_up_proj.weight": torch.zeros(0, 6)}, "phi3")
    with pytest.raises(LayoutError, match="give their number"):
        unpack(pack(block(LAYOUTS["dbrx"]), "dbrx"), "dbrx")
    with pytest.raises(LayoutError, match="5 experts do not divide"):
        unpack(pack(block(LAYOUTS["dbrx"]), "dbrx"), "dbrx", experts=5)
    mixtral = pack(block(LAYOUTS["mixtral"]), "mixtral")
    some = {name: t for name, t in mixtral.items() if not name.startswith("1.")}
    with pytest.raises(LayoutError, match="some miss"):
        unpack(some, "mixtral")


def test_a_square_block_is_never_guessed() -> None:
    # d_model = d_hidden: no shape tells a transpose, so only the name of the layout does.
    square = {f"{p}.weight": torch.randn(3, 8, 8) for p in ("gate_proj", "up_proj", "down_proj")}
    one, other = pack(square, "experts-packed"), pack(square, "llama4")
    assert one["down_proj"].shape == other["down_proj"].shape
    assert not torch.equal(one["down_proj"], other["down_proj"])
    assert torch.equal(unpack(other, "llama4")["down_proj.weight"], square["down_proj.weight"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gate_proj.lora_A.weight", "merge the adapter"),
        ("gate_proj.weight_scale_inv", "dequantise"),
        ("gate_proj.qweight", "dequantise"),
        ("gate_proj.other", "left behind"),
    ],
)
def test_a_tensor_that_hangs_on_a_block_stops_it(name: str, reason: str) -> None:
    weights = block(LAYOUTS["llama"])
    model = pack(weights, "llama", path="model.layers.0.mlp")
    with pytest.raises(LayoutError, match=reason):
        unpack({**model, f"model.layers.0.mlp.{name}": torch.zeros(2)}, "llama", layer=0)


def test_quantised_experts_are_refused() -> None:
    names = ("gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales")
    model = {f"model.layers.0.mlp.experts.{name}": torch.zeros(2, 2) for name in names}
    with pytest.raises(LayoutError, match="dequantise"):
        unpack(model, "gpt-oss", layer=0)


# Whole models


def test_a_layer_of_a_model_by_number_and_by_path() -> None:
    first, second = block(LAYOUTS["t5"]), block(LAYOUTS["t5"])
    second = {key: tensor + 7 for key, tensor in second.items()}
    paths = "encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"
    model = pack(first, "t5", path=paths[0]) | pack(second, "t5", path=paths[1])
    model["shared.weight"] = torch.zeros(3)
    got = unpack(model, "t5", layer=paths[1])
    assert torch.equal(got["up_proj.weight"], second["up_proj.weight"])
    with pytest.raises(LayoutError, match=r"layer 0 is not one block: name one of decoder.block"):
        unpack(model, "t5", layer=0)
    with pytest.raises(LayoutError, match="there is no layer 5; the blocks are"):
        unpack(model, "t5", layer=5)
    with pytest.raises(LayoutError, match="no block of layout 'phi3' is here: nothing is called"):
        unpack(model, "phi3", layer=0)


def test_experts_and_routers_are_no_part_of_a_dense_block() -> None:
    dense = block(LAYOUTS["llama"], bias=False)
    experts = block(LAYOUTS["experts-separate"])
    model = pack(dense, "llama", path="model.layers.0.mlp")
    model |= pack(dense, "llama", path="model.layers.1.mlp.shared_experts")
    model |= pack(experts, "experts-separate", path="model.layers.1.mlp.experts")
    model["model.layers.1.mlp.gate.weight"] = torch.zeros(3, D_MODEL)
    assert torch.equal(unpack(model, "llama", layer=1)["up_proj.weight"], dense["up_proj.weight"])
    got = unpack(model, "experts-separate", layer=1, expert=2)
    assert torch.equal(got["up_proj.weight"], experts["up_proj.weight"][2])
    with pytest.raises(LayoutError, match="no expert 3: the block has 3"):
        unpack(model, "experts-separate", layer=1, expert=3)


def test_what_is_fused_with_attention_is_read_from_its_end() -> None:
    weights = block(LAYOUTS["llama"], bias=False)
    gate, up, down = (weights[f"{p}.weight"] for p in ("gate_proj", "up_proj", "down_proj"))
    attention = torch.randn(30, D_MODEL, dtype=torch.float64)
    palm = {
        "fused_attn_ff_proj.weight": torch.cat([attention, up, gate]),
        "ff_out.1.weight": down,
    }
    got = unpack(palm, "palm-rlhf")
    assert torch.equal(got["gate_proj.weight"], gate)
    assert torch.equal(got["up_proj.weight"], up)
    columns = torch.randn(D_OUT, 20, dtype=torch.float64)
    flux = {
        "to_qkv_mlp_proj.weight": torch.cat([attention, gate, up]),
        "to_out.weight": torch.cat([columns, down], 1),
    }
    got = unpack(flux, "flux2-single", d_hidden=D_HIDDEN)
    for key in weights:
        assert torch.equal(got[key], weights[key]), key
    with pytest.raises(LayoutError, match="fused with attention: give d_hidden"):
        unpack(flux, "flux2-single")
    with pytest.raises(LayoutError, match="too small for a block"):
        unpack(flux, "flux2-single", d_hidden=1000)


def test_gradients_flow_through() -> None:
    gate = torch.randn(4, 2, requires_grad=True)
    weights = {"gate_proj.weight": gate, "up_proj.weight": gate * 2, "down_proj.weight": gate.T}
    again = unpack(pack(weights, "quack"), "quack")
    (gradient,) = torch.autograd.grad(again["gate_proj.weight"].sum(), gate)
    assert torch.equal(gradient, torch.ones(4, 2))


def test_the_names_of_layouts_are_helped() -> None:
    assert get_layout("phi3") is gf.layouts.LAYOUTS["phi3"]
    with pytest.raises(LayoutError, match="did you mean llama"):
        get_layout("lama")
    with pytest.raises(TypeError):
        LAYOUTS["new"] = LAYOUTS["llama"]  # type: ignore[index]


def test_positions_and_their_count_agree() -> None:
    for block_size, second in itertools.product((1, 2, 3, 6), (False, True)):
        place = positions(0, 6, second, block_size)
        for position in range(13):
            assert before(position, second, block_size) == int((place < position).sum())


def test_an_activation_and_its_gated_variant() -> None:
    pairs = {
        "silu": "swiglu",
        "gelu": "geglu",
        "gelu_pytorch_tanh": "geglu_tanh",
        "relu": "reglu",
        "relu2": "relu2_glu",
        "quick_gelu": "quick_geglu",
        "sigmoid": "glu",
    }
    for activation, variant in pairs.items():
        assert gated_name(activation, gated=True) == variant
        assert gated_name(activation, gated=False) == get_variant(activation).name
    assert gated_name("gated-gelu", gated=True) == "geglu_tanh"
    with pytest.raises(LayoutError, match="the blocks have no gate"):
        gated_name("gated-silu", gated=False)
    with pytest.raises(LayoutError, match="no variant has a gate"):
        gated_name("selu", gated=True)
