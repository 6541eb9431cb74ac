"""One call of batch norm, from its record to its results: operators and their derivatives.

`calls` says what a pass takes and `operators` under which names torch knows it; `choice` decides
which way a call goes. `passes` runs a pass, over one rank or several; `derivatives` differentiates
it, `transforms` and `rules` tell torch how. `composite` is the same in torch's own operators.

May import: torch, the extension, and each other.
Must not import: `batch_norm`, modules, or anything else that calls it.
"""
