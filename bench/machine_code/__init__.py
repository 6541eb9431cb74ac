"""What the compiler made of the kernels, read from its own output and from the disassembly.

- compile.py: compiled object and architecture -> PTX, resources and disassembly, cached
- listing.py: those three texts -> launch bounds, resources and instructions
- loops.py: instructions -> loops of the control flow graph
- kernels.py: all of it -> one Kernel record, and what is wrong with it
- instances.py: extension -> the kernel instances in it, as a profiler names them
- budget.py: Kernel and described device -> share of issue slots at full bandwidth

May import: `loading` and `toolkit`.
Must not import: torch, or anything else of bench: it runs where there is a compiler and no torch.
"""
