"""What `explain` says of a tensor, and how: `explain` asks the plan, `plan_kernels` reads it.

May import: the extension, the described devices, and of the operators how they see a tensor and
which backend takes it. `explanation` and `plan_kernels` are plain values and work without torch.
Must not import: autograd Functions, modules, conversion. Only the package's front imports it.
"""
