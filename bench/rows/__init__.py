"""Rows of results and the CSV files that hold them, whole at every moment.

May import: the standard library.
Must not import: torch, or anything else of bench: it is read where neither is needed.
"""
