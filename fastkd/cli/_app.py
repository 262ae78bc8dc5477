"""The table of commands. Each command's module says what it does; here they only get their names."""

from __future__ import annotations

from tyro.extras import SubcommandApp


def build_app() -> SubcommandApp:
    """Assemble the application (imports torch-free modules only; each command imports what it runs on)."""
    from fastkd.cli import convert, data, demo, evaluate, info, train

    app = SubcommandApp()
    app.command(name="info")(info.info)
    shapes = SubcommandApp()
    shapes.command(name="make-shapes")(data.make_shapes)
    app.command(shapes, name="data", help="make data sets")
    app.command(name="train")(train.train)
    app.command(name="distill")(train.distill)
    app.command(name="evaluate")(evaluate.evaluate)
    app.command(name="convert")(convert.convert)
    app.command(name="demo")(demo.demo)
    return app
