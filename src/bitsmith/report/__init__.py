"""Reports: one self-contained HTML page per run, one that compares runs, one of shifts, one of flatness."""

from bitsmith.report.compare import write_comparison
from bitsmith.report.flatness import write_flatness_page
from bitsmith.report.html import write_report
from bitsmith.report.shifts import write_shift_page

__all__ = ["write_comparison", "write_flatness_page", "write_report", "write_shift_page"]
