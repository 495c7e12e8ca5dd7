"""A kernel that is launched often: Triton's own way there takes longer than few tokens do."""

from typing import Any

from triton import knobs
from triton.runtime import driver

from gatedffn.ops import gpu


class Launch:
    """A kernel with its grid and what it is compiled for. Its first call compiles it.

    Later calls hand their arguments to the compiled kernel, as Triton does in the end. It is for
    arguments that Triton would compile alike: of the same dtypes, the same alignment of addresses
    and on the same device.
    """

    __slots__ = ("_compiled", "_constants", "_grid", "_kernel", "_options", "_values")

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], constants: dict[str, Any], **options: int
    ) -> None:
        self._kernel, self._grid = kernel, grid
        self._constants, self._options = constants, options
        # The compiled kernel takes, and ignores, the constants: behind the arguments, in order.
        self._values = tuple([constants[n] for n in kernel.arg_names if n in constants])
        self._compiled: Any = None

    def __call__(self, device: int, *arguments: Any) -> None:
        compiled = self._compiled
        if compiled is None or _watched():
            launched = self._kernel[self._grid](*arguments, **self._constants, **self._options)
            self._compiled = None if gpu.interpreting() else launched
            return
        compiled.run(
            *self._grid,
            driver.active.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            *(None, None, None),  # of the hooks
            *arguments,
            *self._values,
        )


def _watched() -> bool:
    """Whether a profiler has asked to be told of launches."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)
