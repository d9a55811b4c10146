"""`fedhpc report`: one page about any number of runs, and its tables as CSV and LaTeX."""

from fedhpc.commands.report.groups import deviation_of_last
from fedhpc.commands.report.page import check_report_target, write_report
from fedhpc.commands.report.published import Reference, read_reference
from fedhpc.commands.report.runs import RoundRecord, counted, read_run

__all__ = [
    "Reference",
    "RoundRecord",
    "check_report_target",
    "counted",
    "deviation_of_last",
    "read_reference",
    "read_run",
    "write_report",
]
