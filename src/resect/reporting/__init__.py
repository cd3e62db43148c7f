"""What was promised, whether it is kept and what it cost: for the terminal, as HTML, and as JSON."""

from resect.reporting.html import html_report
from resect.reporting.record import record, record_text
from resect.reporting.report import Report
from resect.reporting.terminal import print_report, rendered

__all__ = ["Report", "html_report", "print_report", "record", "record_text", "rendered", "report_files"]


def report_files(report: Report) -> dict[str, str]:
    """The report's files by name, as `resect.save(..., files=)` takes them."""
    return {"result.json": record_text(report), "report.html": html_report(report)}
