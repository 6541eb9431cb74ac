"""The package's version, in one place: setup.py, the cache key and the public API read it here."""

__version__ = "0.1.0"
