"""The output of a batch norm that waits for what stands behind it, and what it knows of that.

`activations` is the table of the ways in which people write an activation. `forecast` is what
conversion leaves with a batch norm: what it expects to happen to the output. With a good one, a
call gives a `pending.Pending`: a tensor that has not been computed and waits for the add and the
activation. Whatever else is done with it first, it is computed then, as the ordinary tensor that it
stands for. So the forecast decides what is fast, and what really happens decides what is computed.
docs/fusion.md has more; `_models/behind.py` makes the forecasts.

May import: torch, and of the operators the records, the activations, and `choice`.
Must not import: the modules, which stand on this, or what looks at whole models.
"""
