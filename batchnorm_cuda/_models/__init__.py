"""What the package does with whole models: finds their batch norms' surroundings, and folds them.

`traced_calls` says what a model calls in which order, `source_uses` what the source of a forward
does with its modules where that cannot be traced. `folding` is the arithmetic of a batch norm in
the layer before it; `torch_tools` what torch's own tools have to be told of our batch norms.

May import: torch, the modules and `convert`.
Must not import: operators beyond `choice`, the extension, or what explains plans.
"""
