"""Reports of a distillation run: a self-contained HTML page, a console table, mask overlays.

- `write_report` writes the page: results, scores of samples, curves, examples, what losses compare, environment.
- `console_table` prints the results in a terminal.
- `save_overlay` writes one image with a mask drawn over it.

Metrics are percentages, as in published tables: 52.9, not 0.529.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkd._lazy import lazy_names

if TYPE_CHECKING:
    from fastkd.report.compared import ChannelRelations, WordAttention
    from fastkd.report.console import console_table
    from fastkd.report.logs import curves_from_log
    from fastkd.report.overlays import save_overlay
    from fastkd.report.page import write_report
    from fastkd.report.records import CurveSeries, Example, ResultRow
    from fastkd.report.scores import SampleIoU
    from fastkd.report.sheets import contact_sheet

__all__ = [
    "ChannelRelations",
    "CurveSeries",
    "Example",
    "ResultRow",
    "SampleIoU",
    "WordAttention",
    "console_table",
    "contact_sheet",
    "curves_from_log",
    "save_overlay",
    "write_report",
]

__getattr__ = lazy_names(
    __name__,
    {
        "ChannelRelations": "fastkd.report.compared",
        "CurveSeries": "fastkd.report.records",
        "Example": "fastkd.report.records",
        "ResultRow": "fastkd.report.records",
        "SampleIoU": "fastkd.report.scores",
        "WordAttention": "fastkd.report.compared",
        "console_table": "fastkd.report.console",
        "contact_sheet": "fastkd.report.sheets",
        "curves_from_log": "fastkd.report.logs",
        "save_overlay": "fastkd.report.overlays",
        "write_report": "fastkd.report.page",
    },
)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
