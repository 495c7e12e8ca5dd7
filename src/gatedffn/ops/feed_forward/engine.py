"""Who computes a call: the ways of the device that its tensors are on."""

from gatedffn.ops.feed_forward.call import CPU, Call
from gatedffn.ops.feed_forward.cpu import ways as cpu
from gatedffn.ops.feed_forward.gpu import ways as gpu
from gatedffn.ops.feed_forward.ways import Ways

BACKENDS = tuple(dict.fromkeys((*cpu.WAYS.ways, *gpu.WAYS.ways)))
"""The ways of all devices by the name that `backend=` takes."""


def ways_of(call: Call) -> Ways:
    """The ways of a call's device."""
    return cpu.WAYS if call.device is CPU else gpu.WAYS
