"""The published formulas, under the names and signatures in which they were published.

Read it beside Shazeer 2020, "GLU Variants Improve Transformer" (arXiv 2002.05202). As there, `x`
is multiplied from the left and weights are (in, out): the transpose of what `torch.nn.Linear`
stores. `W` belongs to the branch that is activated (our gate), `V` to the other one (our up).
This page is plain PyTorch and uses nothing else of this library.
"""

import torch
from torch import Tensor

# Section 1: the feed-forward network of the Transformer, and two that replace its ReLU.


def ReLU(x: Tensor) -> Tensor:
    return torch.relu(x)


def GELU(x: Tensor) -> Tensor:
    return 0.5 * x * torch.erfc(-x / 2**0.5)  # x Phi(x)


def Swish(x: Tensor, beta: float | Tensor) -> Tensor:
    return x * torch.sigmoid(beta * x)


def FFN(x: Tensor, W1: Tensor, W2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    """Equation 1: `max(0, x W1 + b1) W2 + b2`."""
    return ReLU(x @ W1 + b1) @ W2 + b2


def FFN_ReLU(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """Equation 2: `max(x W1, 0) W2`."""
    return ReLU(x @ W1) @ W2


def FFN_GELU(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """Equation 3: `GELU(x W1) W2`."""
    return GELU(x @ W1) @ W2


def FFN_Swish(x: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """Equation 3: `Swish_1(x W1) W2`."""
    return Swish(x @ W1, 1.0) @ W2


# Section 2: gated linear units and variants.


def GLU(x: Tensor, W: Tensor, V: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Equation 4: `sigmoid(x W + b) * (x V + c)`."""
    return torch.sigmoid(x @ W + b) * (x @ V + c)


def Bilinear(x: Tensor, W: Tensor, V: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Equation 4: `(x W + b) * (x V + c)`."""
    return (x @ W + b) * (x @ V + c)


def ReGLU(x: Tensor, W: Tensor, V: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Equation 5: `max(0, x W + b) * (x V + c)`."""
    return ReLU(x @ W + b) * (x @ V + c)


def GEGLU(x: Tensor, W: Tensor, V: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Equation 5: `GELU(x W + b) * (x V + c)`."""
    return GELU(x @ W + b) * (x @ V + c)


def SwiGLU(x: Tensor, W: Tensor, V: Tensor, b: Tensor, c: Tensor, beta: float | Tensor) -> Tensor:
    """Equation 5: `Swish_beta(x W + b) * (x V + c)`."""
    return Swish(x @ W + b, beta) * (x @ V + c)


# Equation 6: the feed-forward layers made of them, without biases.


def FFN_GLU(x: Tensor, W: Tensor, V: Tensor, W2: Tensor) -> Tensor:
    """`(sigmoid(x W) * x V) W2`."""
    return (torch.sigmoid(x @ W) * (x @ V)) @ W2


def FFN_Bilinear(x: Tensor, W: Tensor, V: Tensor, W2: Tensor) -> Tensor:
    """`(x W * x V) W2`."""
    return ((x @ W) * (x @ V)) @ W2


def FFN_ReGLU(x: Tensor, W: Tensor, V: Tensor, W2: Tensor) -> Tensor:
    """`(max(0, x W) * x V) W2`."""
    return (ReLU(x @ W) * (x @ V)) @ W2


def FFN_GEGLU(x: Tensor, W: Tensor, V: Tensor, W2: Tensor) -> Tensor:
    """`(GELU(x W) * x V) W2`."""
    return (GELU(x @ W) * (x @ V)) @ W2


def FFN_SwiGLU(x: Tensor, W: Tensor, V: Tensor, W2: Tensor) -> Tensor:
    """`(Swish_1(x W) * x V) W2`."""
    return (Swish(x @ W, 1.0) * (x @ V)) @ W2
