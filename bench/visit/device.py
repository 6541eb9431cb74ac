"""What is here: GPU, driver, clocks, versions. Its own process: to ask a driver may hang.

python -m bench.visit.device --out FILE.json [--rehearse]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import environment
from .parts import find_site

_SECONDS = 20


def nvidia_smi() -> str:
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi gave no answer in {_SECONDS} s"
    return done.stdout + done.stderr


def find(rehearse: bool) -> dict[str, Any]:
    site = find_site(rehearse, None)
    found = {
        "gpu": site.gpu,
        "device": site.device,
        "toolkit": site.toolkit,
        "sanitizer": None if site.sanitizer is None else str(site.sanitizer),
    }
    return found | {"environment": environment.collect(None if site.gpu else "h100")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.device", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    print(nvidia_smi())
    found = find(options.rehearse)
    options.out.write_text(json.dumps(found, indent=1))
    for name, value in found["environment"].items():
        print(f"{name}: {value}")
    print(found["device"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
