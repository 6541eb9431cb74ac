"""What runs on the GPU in processes of its own, and how they answer; each is started by the command
of its name (`bench.smoke`, `bench.counters`, `bench.training_step`).

May import: `models`, `rows`, `timing`, and what the top of bench gives all.
Must not import: commands, `tuning`, `pages`.
"""
