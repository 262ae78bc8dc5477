"""Versions and hardware of a run, as the report shows them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastkd import _info


def describe() -> dict[str, str]:
    """Return the versions, processor, threads and GPU of this process, keyed by the report's labels."""
    import torch

    facts = _info.environment()
    found = {"fastkd": facts["fastkd"], "Python": facts["python"], "torch": facts["torch"]}
    for package in ("triton", "timm", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    shown = {"System": "system", "Processor": "cpu", "Cores": "cores", "Threads": "threads"}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found | {label: str(facts[name]) for label, name in shown.items()} | {"GPU": gpu}
