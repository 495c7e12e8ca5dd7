"""The scalar functions of the table's rows, with their derivatives; see `reference.py`."""

from gatedffn.activations.own import OwnVariant, variant, variant_named
from gatedffn.activations.reference import SCALARS, Scalar, Value

__all__ = ["SCALARS", "OwnVariant", "Scalar", "Value", "variant", "variant_named"]
