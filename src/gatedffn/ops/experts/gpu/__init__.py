"""Experts' own kernels for GPUs, in Triton; nothing here is imported before a GPU is used."""
