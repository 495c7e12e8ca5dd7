"""The operators, one room each: `reference.py` is the definition, `op.py` registers it."""
