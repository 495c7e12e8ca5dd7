"""Why 11008? Widths at which a gated layer has as many weights as one without a gate."""

import gatedffn as gf

# Without a gate there are two matrices, 4 d_model wide; with one three, so two thirds as wide.
print(gf.hidden_size(4096, multiple_of=256, explain=True))
# 4 * 4096 = 16384 -> 2/3 of it: 10922 -> up to a multiple of 256: 11008 -> weights x 1.0078

# LLaMA: multiples of 256, later a multiplier.
assert gf.hidden_size(4096, multiple_of=256) == 11008  # 7B
assert gf.hidden_size(5120, multiple_of=256) == 13824  # 13B
assert gf.hidden_size(8192, multiple_of=4096, multiplier=1.3) == 28672  # Llama 2 70B
assert gf.hidden_size(4096, multiple_of=1024, multiplier=1.3) == 14336  # Llama 3 8B

# T5 base: 3072 without a gate, 2048 with one.
assert gf.hidden_size(768, variant="relu") == 3072
assert gf.hidden_size(768, variant="geglu") == 2048

# A multiplier is no longer equal in size, and `explain` says by how much.
wide = gf.hidden_size(4096, multiple_of=1024, multiplier=1.3, explain=True)
print(wide)
assert wide.parameter_ratio > 1.3

# FeedForward uses this width when it is given none, and never changes one that it is given.
assert gf.FeedForward(768, variant="geglu").d_hidden == 2048
assert gf.FeedForward(768, 3072, variant="geglu").d_hidden == 3072
