"""The contestants that are not PyTorch; each is imported only where it is measured.

Every one gets the weights as constants of its model where it has such, static sizes, and as many
threads as PyTorch uses.
"""

from importlib import import_module
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gatedffn.bench.contestants import Contestant
from gatedffn.bench.inputs import Inputs
from gatedffn.bench.workloads import Workload
from gatedffn.variants import PAPER, VARIANTS


class Peer(Contestant):
    """What holds for all of them: the variants of the paper, and which workloads they can do."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    trains = False

    @classmethod
    def refusal(cls, workload: Workload) -> str | None:
        if workload.training and not cls.trains:
            return "does not train"
        if workload.dtype not in cls.dtypes:
            return f"computes {' and '.join(cls.dtypes)}, not {workload.dtype}"
        if workload.variant not in PAPER:
            return f"{workload.variant} is not written for it here, only the paper's eight variants"
        return super().refusal(workload)


class OnnxRuntime(Peer):
    """ONNX Runtime's CPU provider, all graph optimisations on."""

    label = "ONNX Runtime"
    needs = ("onnxruntime", "onnx")
    dtypes = ("float32", "float16")

    PHI = MappingProxyType(
        {
            "relu": ["Relu"],
            "gelu": ["Gelu"],
            "swish": ["Sigmoid", "Mul"],  # which it joins to one
            "sigmoid": ["Sigmoid"],
            "identity": [],
        }
    )

    def __init__(self, workload: Workload, inputs: Inputs, threads: int) -> None:
        runtime = import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        self.session = runtime.InferenceSession(
            self._model(workload, inputs), options, providers=["CPUExecutionProvider"]
        )
        # Into the same memory every time: new memory costs it more than some of the products.
        self.x, self.output = inputs.x, torch.empty_like(inputs.x)
        self.binding = self.session.io_binding()
        for name, bind, tensor in (
            ("x", self.binding.bind_input, self.x),
            ("output", self.binding.bind_output, self.output),
        ):
            kind = tensor.numpy().dtype.type
            bind(name, "cpu", 0, kind, list(tensor.shape), tensor.data_ptr())

    def _model(self, workload: Workload, inputs: Inputs) -> bytes:
        helper = import_module("onnx.helper")
        numpy_helper = import_module("onnx.numpy_helper")
        kind = getattr(
            import_module("onnx").TensorProto, workload.dtype.replace("float32", "float").upper()
        )
        nodes, constants = [], []

        def node(kind: str, *names: str) -> None:
            *given, made = names
            nodes.append(helper.make_node(kind, given, [made]))

        for name, weight in (("gate", inputs.gate), ("up", inputs.up), ("down", inputs.down)):
            if weight is not None:
                values = weight.t().contiguous().numpy()
                constants.append(numpy_helper.from_array(values, f"{name}_weight"))
                if name != "down":
                    node("MatMul", "x", f"{name}_weight", name)
        variant = VARIANTS[workload.variant]
        hidden = gate = "gate" if variant.gated else "up"
        for number, operation in enumerate(self.PHI[variant.phi]):
            factors = (gate, hidden) if operation == "Mul" else (hidden,)
            hidden = f"gate_{number}"
            node(operation, *factors, hidden)
        if variant.gated:
            node("Mul", hidden, "up", "hidden")
            hidden = "hidden"
        node("MatMul", hidden, "down_weight", "output")
        shape = [workload.tokens, workload.d_model]
        graph = helper.make_graph(
            nodes,
            "feed_forward",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("output", kind, shape)],
            constants,
        )
        # The oldest versions that have Gelu: every runtime of the last two years reads them.
        opset = helper.make_opsetid("", 20)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
        content = model.SerializeToString()
        assert isinstance(content, bytes)
        return content

    def step(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def results(self) -> dict[str, Tensor]:
        return {"output": self.output}


class OpenVino(Peer):
    """OpenVINO's CPU plugin with the latency hint, weights and arithmetic in that dtype.

    The input has three sizes, as in a Transformer: only then does it join the whole layer to one
    operation, on processors where it has that.
    """

    label = "OpenVINO"
    needs = ("openvino",)
    HINTS = MappingProxyType({"float32": "f32", "bfloat16": "bf16", "float16": "f16"})
    CAPABILITIES = MappingProxyType({"float32": "FP32", "bfloat16": "BF16", "float16": "FP16"})

    def __init__(self, workload: Workload, inputs: Inputs, threads: int) -> None:
        self.openvino = import_module("openvino")
        core = self.openvino.Core()
        if self.CAPABILITIES[workload.dtype] not in core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise NotImplementedError(f"it has no {workload.dtype} arithmetic for this processor")
        hint = self.HINTS[workload.dtype]
        self.dtype = workload.torch_dtype
        self.kind = getattr(self.openvino.Type, hint)
        self.inputs = inputs  # the tensors of the model share their memory
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
        }
        shape = [1, workload.tokens, workload.d_model]
        compiled = core.compile_model(self._model(workload, inputs, shape), "CPU", settings)
        self.request = compiled.create_infer_request()
        self.x = self._tensor(inputs.x, shape)
        self.request.set_input_tensor(self.x)

    def _model(self, workload: Workload, inputs: Inputs, shape: list[int]) -> Any:
        ops = import_module("openvino.opset13")
        phi = {
            "relu": ops.relu,
            "gelu": lambda x: ops.gelu(x, "erf"),
            "swish": lambda x: ops.multiply(x, ops.sigmoid(x)),  # which it joins to one
            "sigmoid": ops.sigmoid,
            "identity": lambda x: x,
        }

        def product(x: Any, weight: Tensor) -> Any:
            constant = ops.constant(self._tensor(weight, list(weight.shape)))
            return ops.matmul(x, constant, False, True)

        x = ops.parameter(shape, self.kind)
        variant = VARIANTS[workload.variant]
        up = product(x, inputs.up)
        gate = up if inputs.gate is None else product(x, inputs.gate)
        hidden = phi[variant.phi](gate)
        if variant.gated:
            hidden = ops.multiply(hidden, up)
        return self.openvino.Model([product(hidden, inputs.down)], [x], "feed_forward")

    def _tensor(self, values: Tensor, shape: list[int]) -> Any:
        # NumPy has no bfloat16: the same bytes under another name.
        array = (values.view(torch.uint16) if self.kind.size == 2 else values).numpy()
        return self.openvino.Tensor(array, shape, self.kind)

    def step(self) -> None:
        self.request.infer()

    def results(self) -> dict[str, Tensor]:
        array = self.request.get_output_tensor(0).data
        output = torch.frombuffer(bytearray(array.tobytes()), dtype=self.dtype)
        return {"output": output.reshape(self.inputs.x.shape)}


class Jax(Peer):
    """JAX's CPU backend: one jitted function, weights as arguments, gradients by its own vjp."""

    label = "JAX"
    needs = ("jax", "jaxlib")
    trains = True

    def __init__(self, workload: Workload, inputs: Inputs, threads: int) -> None:
        del threads  # it takes NPROC, which the worker's surroundings set
        jax = import_module("jax")
        jax.config.update("jax_platforms", "cpu")
        variant = VARIANTS[workload.variant]
        phi = {
            "relu": jax.nn.relu,
            "gelu": lambda x: jax.nn.gelu(x, approximate=False),
            "swish": jax.nn.silu,
            "sigmoid": jax.nn.sigmoid,
            "identity": lambda x: x,
        }[variant.phi]

        def forward(x: Any, *weights: Any) -> Any:
            *gates, up_weight, down_weight = weights
            up = x @ up_weight
            if not gates:
                return phi(up) @ down_weight
            return (phi(x @ gates[0]) * up) @ down_weight

        def training(d_output: Any, *arguments: Any) -> Any:
            output, pull = jax.vjp(forward, *arguments)
            return output, pull(d_output)

        self.workload, self.jax = workload, jax
        self.names = ["x", *(["gate"] if variant.gated else []), "up", "down"]
        weights = [getattr(inputs, name) for name in self.names[1:]]
        # (in, out), as JAX's layers store them.
        self.arguments = [self._array(inputs.x), *(self._array(w.t()) for w in weights)]
        if workload.training:
            self.arguments.insert(0, self._array(inputs.d_output))
        self.call = jax.jit(training if workload.training else forward)
        self.made: Any = None

    def _array(self, values: Tensor) -> Any:
        numpy = self.jax.numpy
        array = numpy.asarray(values.float().contiguous().numpy())
        return array.astype(self.workload.dtype).block_until_ready()

    def step(self) -> None:
        self.made = self.jax.block_until_ready(self.call(*self.arguments))

    def results(self) -> dict[str, Tensor]:
        if not self.workload.training:
            return {"output": self._tensor(self.made)}
        output, gradients = self.made
        found = {"output": self._tensor(output)}
        for name, gradient in zip(self.names, gradients, strict=True):
            tensor = self._tensor(gradient)
            found[name] = tensor if name == "x" else tensor.t()
        return found

    def _tensor(self, array: Any) -> Tensor:
        return torch.tensor(import_module("numpy").asarray(array.astype("float32")))
