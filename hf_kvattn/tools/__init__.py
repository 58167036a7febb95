"""The table of commands, and what they share, whatever they do: inputs, conditions, command lines, tables and files.

Measurements (`evaluation`) and conversions (`convert`) import it; the caches, kernels and the plugin do not.
"""
