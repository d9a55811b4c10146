"""`fedhpc report`: one page about any number of runs, and its tables as CSV and LaTeX."""

from fedhpc.pages.page import write_report

__all__ = ["write_report"]
