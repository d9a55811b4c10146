"""Predictions, and scores of them."""
