"""What `replace` did: block by block, for people and for programs, and how to take it back."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gatedffn.errors import SettingError
from gatedffn.gain import Gain, closing, counted, gain_of
from gatedffn.interop.replacing.roles import BlockRoles, ExpertRoles
from gatedffn.interop.replacing.taking import STATE, give_back, is_changed
from gatedffn.roles import together
from gatedffn.sizing import check_size


@dataclass(frozen=True, slots=True)
class Block:
    """A feed-forward block of a model: what computes it now, or why it was left.

    `kind` is its class, `projections` names its matrices by their roles, `order` is that of a
    packed one. A block that was left has a `reason` and no variant.
    """

    name: str
    kind: str
    variant: str | None = None
    parameters: dict[str, float] | None = None
    projections: dict[str, str] | None = None
    order: str | None = None
    notes: tuple[str, ...] = ()
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'} ({self.kind})"


def describe(name: str, kind: str, roles: BlockRoles) -> Block:
    """The line for a block that was replaced."""
    projections = {}
    if roles.gate is not None:
        projections["gate"] = roles.gate.name
    projections["gate and up" if roles.order else "up"] = roles.up.name
    if roles.down is not None:
        projections["down"] = roles.down.name
    notes = []
    if isinstance(roles, ExpertRoles):
        notes.append("experts, weighed before" if roles.weigh == "input" else "experts")
    if roles.down is None:
        notes.append("without the projection down, which is in another module")
    if roles.around is not None:
        notes.append("the rest of the block is computed by its own forward")
    if roles.own_training:
        notes.append("in training by its own forward, which does more then")
    if roles.gate_scale != 1.0:
        notes.append(f"gate times {roles.gate_scale:g}")
    if roles.output_scale != 1.0:
        notes.append(f"output times {roles.output_scale:g}")
    notes += [f"{'.'.join(path)} on the hidden values" for path in roles.hidden]
    return Block(
        name=name,
        kind=kind,
        variant=roles.variant,
        parameters=dict(roles.parameters),
        projections=projections,
        order=roles.order,
        notes=tuple(notes),
    )


class Report:
    """What `gatedffn.replace` did to a model.

    `replaced` and `left` hold a `Block` for each feed-forward of the model; `kept` those that were
    a `FeedForward` before. `str()` is a table; `as_dict()` and `to_json()` are for programs.
    """

    def __init__(
        self,
        replaced: Sequence[tuple[Block, nn.Module]],
        left: Sequence[Block],
        kept: Sequence[Block],
    ) -> None:
        self.replaced = [block for block, _ in replaced]
        self.left = list(left)
        self.kept = list(kept)
        self._gained: list[str] = []
        self._modules = [(block, module, module.__dict__[STATE]) for block, module in replaced]

    def undo(self) -> None:
        """Makes every block that was replaced what it was; its parameters stay as they are now.

        Raises:
            SettingError: a block has been changed since by something else, such as a wrapper.
        """
        blocks = [
            (block, module)
            for block, module, state in self._modules
            if module.__dict__.get(STATE) is state
        ]
        for block, module in blocks:
            if is_changed(module):
                raise SettingError(
                    f"{block} was changed after it was replaced (a hook with a forward of its own, "
                    "or a class put over it): take that away first, then undo"
                )
        for _, module in blocks:
            give_back(module)

    def as_dict(self) -> dict[str, Any]:
        """The same as dictionaries and lists."""
        return {
            name: [asdict(block) for block in getattr(self, name)]
            for name in ("replaced", "left", "kept")
        }

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.left) + len(self.kept)
        if not total:
            return "no feed-forward block was found"
        lines = [f"{len(self.replaced)} of {total} feed-forward blocks replaced"]
        rows = [(b.name or "(the model)", b.kind, _now(b)) for b in self.replaced]
        rows += [(b.name or "(the model)", b.kind, "was computed here before") for b in self.kept]
        rows += [(b.name or "(the model)", b.kind, f"left: {b.reason}") for b in self.left]
        alike: dict[tuple[str, str], list[str]] = {}
        for name, *rest in rows:
            alike.setdefault((rest[0], rest[1]), []).append(name)
        told = [
            (name, *rest)
            for rest, names in alike.items()
            for name in (names if len(names) < 3 else [together(names)])
        ]
        sizes = [max(len(row[i]) for row in told) for i in (0, 1)]
        lines += [f"  {a:{sizes[0]}}  {b:{sizes[1]}}  {c}" for a, b, c in told]
        return "\n".join([*lines, *self._gained])

    def gain(self, tokens: Sequence[int] = (1, 256)) -> str:
        """Measures what is gained in inference: blocks here, beside the model's own code.

        Blocks that are alike are measured once. The last line is all of them in one sentence,
        which the report ends with from then on.

        Args:
            tokens: how many go through a block at a time; a measurement for each number.

        Returns: a line for each kind of block and number of tokens, and the sentence.

        Raises:
            SettingError: nothing was replaced or it was undone, or a number is below 1.
        """
        if not self._modules:
            raise SettingError("nothing was replaced, so there is nothing to gain")
        kinds: dict[str, list[tuple[str, nn.Module]]] = {}
        for block, module, state in self._modules:
            if module.__dict__.get(STATE) is not state:
                raise SettingError(f"{block} is not replaced any more: replace again, then measure")
            shapes = [(*p.shape, p.dtype, p.device) for p in module.parameters()]
            kind = f"{block.kind} {_now(block)} {shapes}"
            kinds.setdefault(kind, []).append((block.name or "(the model)", module))
        lines: list[str] = []
        gains: list[Gain] = []
        for some in kinds.values():
            for count in tokens:
                found = _gain(some[0][1], count)
                told = found or "not measured, its own code computes more than the feed-forward"
                lines.append(f"{together([name for name, _ in some])}, {counted(count)}: {told}")
                gains += [found] * len(some) if found else []
        self._gained = [closing(gains)] if gains else []
        return "\n".join([*lines, *self._gained])

    def __repr__(self) -> str:
        counts = f"replaced={len(self.replaced)}, left={len(self.left)}, kept={len(self.kept)}"
        return f"Report({counts})"


def _gain(module: Any, tokens: int) -> Gain | None:
    """Of a replaced module on so many random tokens, experts chosen by chance; None where its own
    code computes more.
    """
    check_size("tokens", tokens)
    experts = isinstance(module._roles, ExpertRoles)
    like = next(module.parameters())
    d_model = module._gatedffn_sizes()[1] if experts else module.d_model
    x = torch.randn(tokens, d_model, dtype=like.dtype, device=like.device)
    inputs = [x]
    if experts:
        count = module._gatedffn_sizes()[4]
        slots = min(2, count)
        index = torch.rand(tokens, count, device=like.device).topk(slots).indices
        inputs += [index, torch.full((tokens, slots), 1.0 / slots).to(x)]
    return gain_of(module, inputs)


def _now(block: Block) -> str:
    assert block.projections is not None
    words = [f"{name}={value:g}" for name, value in (block.parameters or {}).items()]
    variant = f"{block.variant}" + (f" ({', '.join(words)})" if words else "")
    roles = ", ".join(f"{role} {name}" for role, name in block.projections.items())
    packed = f" ({block.order})" if block.order else ""
    return "; ".join([f"{variant}: {roles}{packed}", *block.notes])
