"""What the model's `config.json` says of its feed-forward blocks."""

import math
from collections.abc import Mapping
from typing import Any

from gatedffn.errors import GatedFFNError, LayoutError
from gatedffn.interop.checkpoints.checkpoint import Checkpoint
from gatedffn.storage.blocks import Block
from gatedffn.storage.model import Layout
from gatedffn.storage.rows import LAYOUTS
from gatedffn.variants import VARIANTS, get_variant

# Fields that change what a block computes: one that the layout does not read is not overlooked.
CHANGING = (
    "swiglu_limit",
    "swiglu_limits",
    "swiglu_limits_shared",
    "swiglu_alpha",
    "swiglu_beta",
    "gegelu_limit",
    "mlp_multipliers",
    "activation_sparsity_pattern",
)
LARGEST_SETTING = 1e30

Config = Mapping[str, Any]


def layouts_of(config: Config | None) -> list[Layout]:
    """The layouts in which checkpoints of the configuration's architecture are stored."""
    named = (config or {}).get("architectures")
    named = named if isinstance(named, list) else []
    return [
        row
        for row in LAYOUTS.values()
        if set(row.architectures) & set(map(str, named))
        and all(lookup(config, key) in values for key, values in row.when.items())
    ]


def from_architecture(checkpoint: Checkpoint, config: Config | None) -> Layout:
    """The layout in which checkpoints of the configuration's architecture are stored.

    Raises:
        LayoutError: nothing says it, or several layouts fit.
    """
    found = layouts_of(config)
    if len(found) == 1:
        return found[0]
    if config is None:
        why = "there is no config.json beside it"
    else:
        named = config.get("architectures")
        why = f"config.json names the architecture {named}"
        if found:
            rows = ", ".join(f"{row.name!r} ({row.used_by})" for row in found)
            why += f", whose blocks are stored in more than one: {rows}"
        else:
            why += ", which no layout knows"
    raise LayoutError(
        f"the layout of {checkpoint.path} must be named: {why}; --from (in Python layout=) names it"
    )


def lookup(config: Config | None, field: str) -> Any:
    """A field of a configuration, or of the text model's inside it; None where it is not.

    >>> lookup({"text_config": {"hidden_act": "silu"}}, "hidden_act")
    'silu'
    """
    for place in ("", "text_config", "llm_config", "ffn_config"):
        inner: Any = (config or {}).get(place) if place else config
        if isinstance(inner, Mapping) and inner.get(field) is not None:
            return inner[field]
    return None


def variant_of(layout: Layout, config: Config | None) -> tuple[str, dict[str, float]] | None:
    """What the blocks of a layout compute: a variant and its parameters; None where nothing says.

    Raises:
        LayoutError: the configuration names an activation that is no row of the table, or one that
            the layout's code does not have, or a field that changes it in a way not known here.
    """
    for key in CHANGING:
        value = lookup(config, key)
        if value and key not in layout.settings.values() and not layout.beyond:
            raise LayoutError(
                f"config.json has {key} = {value}, which changes what a block computes in a way "
                f"that layout {layout.name!r} does not know: name the variant"
            )
    name = _variant_name(layout, config)
    if name is None:
        return None
    parameters: dict[str, float] = {}
    for parameter, key in layout.settings.items():
        if config is None or parameter not in VARIANTS[name].defaults:
            continue
        value = lookup(config, key)
        if value is not None and not _is_number(value):
            raise LayoutError(f"config.json has {key} = {str(value)[:40]!r}: it must be a number")
        if parameter == "limit" and not value and (key in config or value is not None):
            parameters[parameter] = math.inf  # no limit is written as nothing or as 0
        elif value is not None:
            parameters[parameter] = float(value)
    return name, parameters


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < LARGEST_SETTING


def _variant_name(layout: Layout, config: Config | None) -> str | None:
    alone = layout.variants[0] if len(layout.variants) == 1 else None
    for key in layout.activation:
        word = lookup(config, key)
        word = word.get("name") if isinstance(word, Mapping) else word
        if not isinstance(word, str):
            continue
        try:
            name = layout.spellings.get(word) or gated_name(word, gated=layout.gated)
        except GatedFFNError:
            if alone is None:
                raise
            name = None  # no name of ours, and so not that of what the layout's code computes
        if layout.variants and name not in layout.variants:
            raise LayoutError(
                f"config.json has {key} = {word[:40]!r}, and blocks of layout {layout.name!r} "
                f"compute {' or '.join(layout.variants)}: name the variant"
            )
        return name
    return alone


def gated_name(activation: str, *, gated: bool) -> str:
    """The variant whose gate goes through an activation that somebody names; or that activation.

    Raises:
        UnknownVariant: no row is called so.
        LayoutError: it is a gated variant's and there is no gate, or no variant has that gate.

    >>> gated_name("silu", gated=True), gated_name("gelu_new", gated=True)
    ('swiglu', 'geglu_tanh')
    """
    row = get_variant(activation)
    if row.gated == gated:
        return row.name
    if row.gated:
        raise LayoutError(f"{activation!r} is gated, and the blocks have no gate")
    for other in VARIANTS.values():
        if (other.phi, other.psi, other.defaults) == (row.phi, "identity", row.defaults):
            return other.name
    raise LayoutError(f"no variant has a gate that goes through {activation!r}")


def check_gate(variant: str, layout: Layout) -> None:
    """Raises where a variant has a gate and the blocks have none, or the reverse.

    Raises:
        LayoutError: with both names.
    """
    if VARIANTS[variant].gated != layout.gated:
        has = "has a gate" if layout.gated else "has no gate"
        raise LayoutError(f"{variant!r} does not fit: a block of {layout.name!r} {has}")


def check_width(block: Block, config: Config | None) -> None:
    """Raises where the configuration's width is not that of a block.

    Raises:
        LayoutError: both widths, and whether the field counts both halves.
    """
    layout = block.layout
    if layout.width is None or block.place != layout.places[0]:
        return
    value = lookup(config, layout.width)
    if isinstance(value, list) and block.layer is not None and block.layer < len(value):
        value = value[block.layer]
    if type(value) is not int:
        return
    wanted = value // 2 if layout.both_halves else value
    if wanted != block.sizes.d_hidden:
        both = ", gate and up together" if layout.both_halves else ""
        raise LayoutError(
            f"{block.path} has {block.sizes.d_hidden} hidden units in layout {layout.name!r}, and "
            f"config.json says {layout.width} = {value}{both}: is it another layout? If not, as in "
            "a pruned model, any_width takes blocks as wide as they are"
        )
