"""Measurements and proofs about the kernels; nothing here is part of the installed package.

Here are the commands, `python -m bench NAME` or `python -m bench.NAME`, with the benchmark's own
`options`, `runner` and `model`, and what all share: `environment`, `loading`, `toolkit`. The rest
has rooms, each with a word on what it may import: `cases`, `models`, `rows`, `timing`, `tuning`,
`machine_code`, `pages`, `gpu` and `visit`. No room imports a command.
"""
