"""Results table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastkd._console import plain
from fastkd.report import text
from fastkd.report.records import ResultRow, baseline_of, check_rows, gain, summary

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def console_table(rows: Sequence[ResultRow], *, title: str = "Results (%)", console: Console | None = None) -> None:
    """Print result rows as a table; a row with a baseline shows its gains under its metrics.

    One model per line if the terminal is wide enough, else one per column. Characters missing from the console's
    encoding are replaced by ASCII.

    Args:
        rows: lines of the table, in order.
        title: heading of the table.
        console: a ``rich.console.Console``; default: the terminal.

    Raises:
        ValueError: no rows, a repeated name, or a baseline that is not among the rows.

    Example:
        >>> console_table([ResultRow("alone", 315_000, {"mIoU": 34.1})])
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.text import Text

    console = console or Console()

    def styled(text: str, style: str) -> Text:
        return Text(plain(text, console.encoding), style=style)

    grid = _grid(rows, console.encoding)
    console.print()
    console.print(styled(title, "bold"))
    table = _table(grid)
    if Measurement.get(console, console.options.update(width=10_000), table).maximum > console.width:
        table = _table([list(column) for column in zip(*grid, strict=True)])
    console.print(table)
    for row in rows:
        if row.note:
            console.print(styled(f"{row.name}: {row.note}", "dim"))
    for name in dict.fromkeys(row.baseline for row in rows if row.baseline):
        compared = ", ".join(row.name for row in rows if row.baseline == name)
        console.print(styled(f"Second line of {compared}: gain over {name}, in points.", "dim"))


def _grid(rows: Sequence[ResultRow], encoding: str) -> list[list[Text]]:
    """Return the cells, header first, as `Text`: square brackets in a name are not markup."""
    from rich.text import Text

    metrics = check_rows(rows)
    header = ["", "parameters", *metrics, "steps", "training"]
    grid = [[Text(plain(name, encoding), style="bold") for name in header]]
    for row in rows:
        steps = f"{row.steps:,}" if row.steps is not None else "–"
        cells = [text.count(row.parameters), steps, text.duration(row.train_seconds)]
        parameters, *training = (Text(plain(cell, encoding)) for cell in cells)
        name = Text(plain(row.name, encoding), style="bold")
        grid.append([name, parameters, *(_metric(row, metric, rows, encoding) for metric in metrics), *training])
    return grid


def _metric(row: ResultRow, metric: str, rows: Sequence[ResultRow], encoding: str) -> Text:
    from rich.text import Text

    if metric not in row.metrics:
        return Text(plain("–", encoding))
    mean, spread = summary(row.metrics[metric])
    cell = Text(plain(text.number(mean), encoding))
    if spread is not None:
        cell.append(plain(f" ± {text.number(spread)}", encoding), style="dim")
    baseline = baseline_of(row, rows)
    if baseline is not None and metric in baseline.metrics:
        difference, _ = gain(row.metrics[metric], baseline.metrics[metric])
        style = "green" if difference > 0 else "red" if difference < 0 else "dim"
        cell.append(f"\n{plain(text.signed(difference), encoding)}", style=style)
    return cell


def _table(grid: list[list[Text]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for index, cell in enumerate(grid[0]):
        table.add_column(cell, justify="right" if index else "left")
    for line in grid[1:]:
        table.add_row(*line)
    return table
