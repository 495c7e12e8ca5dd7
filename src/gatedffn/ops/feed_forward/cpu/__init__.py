"""The layer on CPUs: its ways, and the C++ that they call."""
