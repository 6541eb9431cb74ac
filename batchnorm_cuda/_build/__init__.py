"""Compiles the extension and loads it: sources, toolkit, recipes, the cache, ahead of time or not.

May import: the standard library, the package's version, and each other; torch only `recipes`,
`extension` and `ahead_of_time`, because setup.py, the Makefile and the benchmark take the others
where there is none. For the same reason this file imports nothing, and `archs`, `jobs`, `sources`,
`toolkit` and `trust` import nothing of the package.
Must not import: operators, modules, or anything else of the package.
"""
