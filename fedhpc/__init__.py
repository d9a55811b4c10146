"""Federated prompt tuning of large language models over MPI (FedPepTAO, EMNLP 2023)."""

__version__ = "0.1.0"
