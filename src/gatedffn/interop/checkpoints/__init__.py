"""Checkpoints of others: read, converted between layouts, verified; `convert.py` has the steps."""
