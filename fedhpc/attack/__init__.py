"""Devices that work against the run, for experiments on what a server method withstands."""
