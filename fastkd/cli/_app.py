"""Register the commands; each is implemented and documented in its own module."""

from __future__ import annotations

from collections.abc import Sequence

from tyro.extras import SubcommandApp


def build_app(args: Sequence[str] = ()) -> SubcommandApp:
    """Return the application; commands import torch and other heavy packages when they run.

    ``args`` begins with the command and, for ``train``, ``distill`` and ``cache``, its configuration, whose settings
    become the defaults of the flags.
    """
    from fastkd.cli import (
        _sets,
        app,
        cache,
        convert,
        data,
        demo,
        evaluate,
        experiments,
        export,
        info,
        predict,
        recipes,
        report,
        train,
    )

    commands = SubcommandApp()
    commands.command(name="info")(info.info)
    datasets = SubcommandApp()
    datasets.command(name="make-shapes")(data.make_shapes)
    datasets.command(name="make-shapesref")(data.make_shapesref)
    datasets.command(name="check")(_sets.check)
    datasets.command(name="convert")(_sets.convert)
    datasets.command(name="show")(_sets.show_samples)
    commands.command(datasets, name="data", help="Make, check, convert and show datasets.")
    commands.command(name="train")(train.with_settings(train.train, args))
    commands.command(name="distill")(train.with_settings(train.distill, args))
    commands.command(name="recipes")(recipes.recipes)
    commands.command(name="cache")(cache.with_settings(args))
    commands.command(name="experiments")(experiments.experiments)
    commands.command(name="evaluate")(evaluate.evaluate)
    commands.command(name="predict")(predict.predict)
    commands.command(name="report")(report.report)
    commands.command(name="app")(app.app)
    commands.command(name="export")(export.export)
    commands.command(name="convert")(convert.convert)
    commands.command(name="demo")(demo.demo)
    return commands
