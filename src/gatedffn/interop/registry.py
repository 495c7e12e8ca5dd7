"""`gatedffn` in the registry of transformers that says what computes the experts of a model."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gatedffn import explanation
from gatedffn.errors import SettingError
from gatedffn.interop.replacing.expert_block import ROLES, by_roles, routed, sizes_of
from gatedffn.interop.replacing.experts import roles_of_experts
from gatedffn.interop.replacing.roles import ExpertRoles
from gatedffn.interop.replacing.structure import NotUnderstood
from gatedffn.interop.replacing.taking import why_changed

NAME = "gatedffn"
MODULE = "transformers.integrations.moe"


def experts_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What a module of experts computes, by its stacked weights.

    What its class computes is found out at the first call, as `gatedffn.replace` does.

    Raises:
        SettingError: it is not understood, or is called with something else.
    """
    roles = _roles(module)
    inputs = routed(module, roles, args, kwargs)
    if inputs is None:
        raise SettingError(
            f"{type(module).__name__} takes {', '.join(roles.arguments)} and nothing else: "
            "(tokens, d_model), (tokens, k) and (tokens, k)"
        )
    return by_roles(module, roles, "gate_up", "auto", *inputs)


def _roles(module: nn.Module) -> ExpertRoles:
    roles: ExpertRoles | None = getattr(module, ROLES, None)
    if roles is None or why_changed(module, roles) is not None:
        roles = _FOUND[_found(module)]
        if not torch.compiler.is_compiling():
            module.__dict__[ROLES] = roles
    return roles


def _sizes(module: nn.Module) -> tuple[str, int, int, int, int] | None:
    """For `explain`, those of experts that transformers has computed here; None of others."""
    config = getattr(module, "config", None)
    # What the registry gives each module whose forward asks it.
    asks = "is_concatenated" in vars(module)
    if not asks or getattr(config, "_experts_implementation", None) != NAME:
        return None
    return sizes_of(module, _roles(module))


_FOUND: dict[str, ExpertRoles] = {}


def _found(module: nn.Module) -> str:
    """The key of what was found out: the compiler of PyTorch runs this and keeps the word."""
    try:
        # No mode, transformation or hook of the caller's reaches another thread: not that of a
        # checkpoint, which would run the call again for what the search keeps.
        with ThreadPoolExecutor(1) as apart:
            roles = apart.submit(roles_of_experts, module).result()
        reason = why_changed(module, roles)
    except NotUnderstood as error:
        reason = str(error)
    if reason is not None:
        raise SettingError(
            f'experts_implementation="{NAME}" cannot compute {type(module).__name__}: {reason}; '
            "use another one"
        )
    key = repr(roles)
    _FOUND[key] = roles
    return key


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
_found._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _register(registry: ModuleType) -> None:
    interface = getattr(registry, "ALL_EXPERTS_FUNCTIONS", None)
    if interface is not None:
        interface.register(NAME, experts_forward)


class _Later(MetaPathFinder):
    """Registers when transformers imports its registry, which nobody here does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODULE:
            return None
        finders = [finder for finder in sys.meta_path if not isinstance(finder, _Later)]
        found = (finder.find_spec(fullname, path, target) for finder in finders)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)


def register() -> None:
    """Registers, now or as soon as transformers is imported."""
    if _sizes not in explanation.SIZES:
        explanation.SIZES.append(_sizes)
    registry = sys.modules.get(MODULE)
    if registry is not None:
        _register(registry)
    elif not any(isinstance(finder, _Later) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Later())
