"""How others store feed-forward blocks, as data, and the way from and to `FeedForward`'s names.

`rows` has a row for every layout; `model.py` has the words of a row, and `arithmetic.py` the
formula of the order.
"""
