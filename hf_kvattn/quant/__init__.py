"""Codecs: pure functions between numbers and packed codes, and the packed layouts. No state of a cache."""
