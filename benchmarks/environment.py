"""What a result depends on besides the code: machine, versions, threads, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    *("torch", "torchvision", "monai", "timm", "onnxruntime", "openvino"),
    *("scikit-learn", "numpy"),
)


def cpu_model() -> str:
    """Name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip().lower() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def commit() -> str | None:
    """The repository's commit, marked when the tree differs from it; None without git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def describe(device: torch.device) -> dict[str, Any]:
    """Everything above, versions and the build, without the paths of the installation."""
    import densenet_fast

    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    paths = ("extension", "cuda_extension")
    own = {key: value for key, value in densenet_fast.build_info().items() if key not in paths}
    return {
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "logical_cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: installed.get(name) for name in PACKAGES},
        "densenet_fast": own,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average_at_start": os.getloadavg()[0],
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
