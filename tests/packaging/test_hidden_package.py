"""Errors where a source tree hides the installed package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def copy_package(folder: Path) -> Path:
    """Copy fastkd's sources without build outputs."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info*", "assets")
    return Path(shutil.copytree(ROOT / "fastkd", folder / "fastkd", ignore=ignore))


def record(site: Path, **origin: Any) -> None:
    """Record an installation of fastkd in ``site``, as pip does."""
    facts = site / "fastkd-9.9.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: fastkd\nVersion: 9.9\n")
    (facts / "RECORD").write_text("")
    if origin:
        (facts / "direct_url.json").write_text(json.dumps(origin))


def unavailable_reasons(tree: Path, site: Path) -> dict[str, str]:
    """Return why the modules are unavailable to a Python started in ``tree``, and which package the tree hides."""
    code = f"""
import functools, json, sys
from importlib.metadata import distributions
from fastkd import _native
_native.distributions = functools.partial(distributions, path={[str(tree), str(site)]!r})  # not this machine's
answer = {{"hides": str(_native.hidden()), "kernels": _native.not_installed("fastkd.kernels")}}
try:
    _native.load("cpu")
except ImportError as error:
    print(json.dumps(answer | {{"cpu": str(error)}}))
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_error_names_a_checkout_that_hides_the_installed_package(tmp_path):
    tree, site = tmp_path / "checkout", tmp_path / "site"
    copy_package(tree)
    (tree / "fastkd.egg-info").mkdir()  # a build leaves it; it is not an installation
    (tree / "fastkd.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: fastkd\nVersion: 9.8\n")
    alone = unavailable_reasons(tree, site)
    assert alone["hides"] == "None"
    assert alone["cpu"].endswith("this source tree was never installed; run `pip install -e .` in it")

    installed = copy_package(site)
    record(site)
    found = unavailable_reasons(tree, site)
    assert found["hides"] == str(installed)
    for name in ("cpu", "kernels"):
        assert (
            f"source tree {tree}, which was never installed and hides the installed package {installed}" in found[name]
        )
        assert "start Python in another folder or with `python -P`" in found[name]
        assert "run `pip install -e .` in the source tree" in found[name]


@pytest.mark.parametrize("own", [True, False])
def test_editable_installation_is_hidden_only_by_another_tree(own, tmp_path):
    tree, other, site = tmp_path / "checkout", tmp_path / "other tree", tmp_path / "site"
    copy_package(tree)
    copy_package(other)
    record(site, url=(tree if own else other).as_uri(), dir_info={"editable": True})
    found = unavailable_reasons(tree, site)
    assert found["hides"] == ("None" if own else str(other / "fastkd"))
