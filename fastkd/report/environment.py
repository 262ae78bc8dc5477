"""Where a run took place: versions, processor, threads."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def describe() -> dict[str, str]:
    """Versions, processor, threads and GPU of this process, ready for a report."""
    import torch

    import fastkd
    from fastkd._machine import cores

    found = {"fastkd": fastkd.__version__, "Python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "timm", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["System"] = f"{platform.system()} {platform.machine()}"
    found["Processor"] = processor()
    found["Cores"] = str(cores())
    found["Threads"] = str(torch.get_num_threads())
    found["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def processor() -> str:
    """The processor's model name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
