"""Models and checkpoints of others: reading, converting."""
