"""Checks and times a case: clocks, providers, samples.

May import: `cases`, `models`, `rows`, and what the top of bench gives all.
Must not import: commands, `tuning`, `gpu`, `pages`.
"""
