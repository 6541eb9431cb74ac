"""What the package does with whole models: finds what is around their batch norms, and uses that.

`traced_calls` says what a model calls in which order, with `regions`, where checkpoints and
gradient modes begin and end, and `snapshot`, by which nothing of the attempt stays. `source_uses`
is what the source of a forward does with its modules where that cannot be traced. `folding` is the
arithmetic of a batch norm in the layer before it. `behind` finds adds and activations behind batch
norms, and `fusing` leaves what it found with them; `timm_layers` has timm's batch norms.
`torch_tools` is what torch's own tools have to be told of our batch norms.

May import: torch, the modules and `convert`, and `_fusion`, which is below them.
Must not import: operators beyond `choice`, the extension, or what explains plans.
"""
