"""A model's feed-forward blocks replaced in place; `replace.py` has the steps in their order."""
