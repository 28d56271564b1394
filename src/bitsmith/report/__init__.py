"""Reports: one self-contained HTML page per run, and one that compares runs."""

from bitsmith.report.compare import write_comparison
from bitsmith.report.html import write_report

__all__ = ["write_comparison", "write_report"]
