"""Caches: where keys and values are stored. A new cache is one layer class in one file."""
