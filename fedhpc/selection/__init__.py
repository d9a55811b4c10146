"""Which layers are exchanged."""
