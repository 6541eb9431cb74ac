"""Rows as pages: tables, plots, one HTML file.

May import: `rows`.
Must not import: torch, or whatever makes rows.
"""
