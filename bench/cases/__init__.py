"""What is timed or counted: an operation on a shape, and where shapes come from.

May import: `models` for what a case must move, `rows` for what became of it.
Must not import: what times, tunes or prints.
"""
