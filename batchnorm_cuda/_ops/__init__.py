"""The operators of batch norm and their derivatives: from one call's record to its results.

`calls` says what a pass takes and `operators` under which names torch knows it; `choice` decides
which way a call goes. `passes` runs a pass, over one rank or several; `derivatives` differentiates
it, `transforms` and `rules` tell torch how. `composite` is the same in torch's own operators.

May import torch and `_build`, which loads the extension; imports nothing of the public surface.
"""
