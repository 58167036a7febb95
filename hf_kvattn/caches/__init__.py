"""Caches store keys and values. A new cache policy is one layer class in one file, and one row in `registry.py`."""
