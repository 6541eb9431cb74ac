"""Measurements and proofs about the kernels; nothing here is part of the installed package."""
