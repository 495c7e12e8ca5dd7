"""The rows: how models and libraries store feed-forward blocks. Facts only.

Read from the sources of each; `model.py` has the words. The gate is the matrix whose product goes
through the activation, whatever its owner calls it.
"""

from collections.abc import Mapping
from types import MappingProxyType

from gatedffn.storage.model import Layout
from gatedffn.storage.rows.expert import EXPERT
from gatedffn.storage.rows.packed import PACKED
from gatedffn.storage.rows.separate import SEPARATE
from gatedffn.storage.rows.ungated import UNGATED

LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {row.name: row for row in (*SEPARATE, *PACKED, *UNGATED, *EXPERT)}
)
"""Every layout by name, read-only."""
