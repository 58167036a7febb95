"""Attention backends, one file each, and the choice between them: `dispatch.Backend` says what a backend has."""
