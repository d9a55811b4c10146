"""The other ranks: the devices' local work."""
