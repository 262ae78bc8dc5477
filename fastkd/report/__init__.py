"""Pictures and tables of a distillation run: one self-contained HTML page, a console table, mask overlays.

- `write_report` writes the page: results, curves, example overlays, environment.
- `console_table` prints the same results in a terminal.
- `save_overlay` writes one image with a mask drawn over it.

Percentages throughout: a metric of 52.9 means 52.9 %, as published tables have it.
"""

from fastkd.report.console import console_table
from fastkd.report.logs import curves_from_log
from fastkd.report.overlays import save_overlay
from fastkd.report.page import write_report
from fastkd.report.records import CurveSeries, Example, ResultRow

__all__ = ["CurveSeries", "Example", "ResultRow", "console_table", "curves_from_log", "save_overlay", "write_report"]
