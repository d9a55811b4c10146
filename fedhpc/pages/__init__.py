"""`fedhpc report`: one page about any number of runs, and its tables as CSV and LaTeX."""

from fedhpc.pages.page import write_report
from fedhpc.pages.runs import Record, counted, read_run

__all__ = ["Record", "counted", "read_run", "write_report"]
