"""How fast the layer is on this machine, against which peers, and how near to its limits."""
