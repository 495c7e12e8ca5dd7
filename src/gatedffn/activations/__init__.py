"""The scalar functions of the table's rows, with their derivatives; see `reference.py`."""

from gatedffn.activations.reference import SCALARS, Scalar, Value

__all__ = ["SCALARS", "Scalar", "Value"]
