"""Where a run took place: GPU, driver, clocks, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from batchnorm_cuda import devices

from .loading import ROOT

_SMI = {
    "driver": "driver_version",
    "clock_sm_mhz": "clocks.current.sm",
    "clock_sm_most_mhz": "clocks.max.sm",
    "clock_memory_mhz": "clocks.current.memory",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "throttle_reasons": "clocks_throttle_reasons.active",
}
_PACKAGES = ("batchnorm_cuda", "torch", "triton", "torchvision", "apex", "inplace_abn")
_SECONDS = 30


def collect(model_device: str | None = None) -> dict[str, Any]:
    """`model_device`: the described device of a run without a GPU."""
    found: dict[str, Any] = {
        "kind": "measured" if model_device is None else "model",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    found |= {name: _version(name) for name in _PACKAGES}
    found["torch"] = torch.__version__  # which build of it, too
    if model_device is not None:
        found["device"] = f"a described {devices.describe(model_device)['name']}"
        return found
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found |= {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return found | query_driver(torch.cuda.current_device())


def query_driver(index: int) -> dict[str, str]:
    """What nvidia-smi says of a GPU; "unknown" where it says nothing."""
    query = f"--query-gpu={','.join(_SMI.values())}"
    answer = _output("nvidia-smi", f"--id={index}", query, "--format=csv,noheader")
    values = [value.strip() for value in answer.split(",")] if answer else []
    if len(values) != len(_SMI):
        values = ["unknown"] * len(_SMI)
    return dict(zip(_SMI, values, strict=True))


def commit() -> str:
    """The commit of this tree, marked where files differ from it."""
    name = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not name:
        return "unknown"
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{name} with changes" if changed else name


def file_stem(device: str) -> str:
    """A device's name as that of a file: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
