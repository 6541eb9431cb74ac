"""Bytes without a GPU: what must move, what other implementations move, what the host model counts.

May import: the package.
Must not import: anything of bench.
"""
