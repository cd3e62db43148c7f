"""What was promised, whether it is kept and what it cost: for the terminal, as HTML, and as JSON."""

from resect.reporting.html import html_report
from resect.reporting.record import record, record_text
from resect.reporting.report import Report
from resect.reporting.specialists import SpecialistReport, print_specialists, record_specialists, specialist_files
from resect.reporting.terminal import print_report, rendered

__all__ = [
    "Report",
    "SpecialistReport",
    "html_report",
    "print_report",
    "print_specialists",
    "record",
    "record_specialists",
    "record_text",
    "rendered",
    "report_files",
    "specialist_files",
]


def report_files(report: Report) -> dict[str, str]:
    """The report's files by name, as `resect.save(..., files=)` takes them."""
    return {"result.json": record_text(report), "report.html": html_report(report)}
