"""Register the commands; each is implemented and documented in its own module."""

from __future__ import annotations

from tyro.extras import SubcommandApp


def build_app() -> SubcommandApp:
    """Return the application; commands import torch and other heavy packages when they run."""
    from fastkd.cli import cache, convert, data, demo, evaluate, export, info, predict, train

    app = SubcommandApp()
    app.command(name="info")(info.info)
    shapes = SubcommandApp()
    shapes.command(name="make-shapes")(data.make_shapes)
    app.command(shapes, name="data", help="make datasets")
    app.command(name="train")(train.train)
    app.command(name="distill")(train.distill)
    app.command(name="cache")(cache.cache)
    app.command(name="evaluate")(evaluate.evaluate)
    app.command(name="predict")(predict.predict)
    app.command(name="export")(export.export)
    app.command(name="convert")(convert.convert)
    app.command(name="demo")(demo.demo)
    return app
