"""The table of commands. Each command's module says what it does; here they only get their names."""

from __future__ import annotations

from tyro.extras import SubcommandApp


def build_app() -> SubcommandApp:
    """Assemble the application (imports torch-free modules only; each command imports what it runs on)."""
    from fastkd.cli import data, demo, evaluate, info, train

    app = SubcommandApp()
    app.command(info.info, name="info")
    shapes = SubcommandApp()
    shapes.command(data.make_shapes, name="make-shapes")
    app.command(shapes, name="data", help="make data sets")
    app.command(train.train, name="train")
    app.command(train.distill, name="distill")
    app.command(evaluate.evaluate, name="evaluate")
    app.command(demo.demo, name="demo")
    return app
