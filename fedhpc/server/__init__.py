"""Rank 0: what a run is made of, the rounds, what is saved."""
