"""The plans of a problem: which there are, which are worth timing, and their times in turns.

May import: `cases`, `rows`, `timing`.
Must not import: commands, `gpu`, `pages`.
"""
