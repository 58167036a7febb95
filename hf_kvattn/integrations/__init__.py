"""Doors to other tools, one file a door. They import the runtime, never the reverse, and their tool when it is used."""
