"""Reports: one self-contained HTML page per run, one that compares runs, one of shifts."""

from bitsmith.report.compare import write_comparison
from bitsmith.report.html import write_report
from bitsmith.report.shifts import write_shift_page

__all__ = ["write_comparison", "write_report", "write_shift_page"]
