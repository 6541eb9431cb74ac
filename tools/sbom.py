"""Writes the package's bill of materials (CycloneDX), and checks that it names what it must.

    python -m tools.sbom [FILE]                     # build/sbom.json

Its root is the package: a wheel ships our own files alone, compiled or not. Components are all that
an installation brings with it, in the versions and with the hashes of .ci/runtime.txt.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.loading import ROOT, load

RUNTIME = ROOT / ".ci" / "runtime.txt"
PROJECT = ROOT / "pyproject.toml"
version = load("batchnorm_cuda", "_version").__version__


def locked(text: str) -> dict[str, str]:
    """Versions by name, of a file of requirements with hashes."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def problems(bill: dict[str, Any], expected: dict[str, str]) -> list[str]:
    """What the bill lacks, or has of something else."""
    root = bill.get("metadata", {}).get("component", {})
    found = [] if root.get("name") == "batchnorm_cuda" else [f"root: got {root.get('name')!r}"]
    if root.get("version") != version:
        found.append(f"root: expected version {version}, got {root.get('version')!r}")
    components = {each["name"]: each for each in bill.get("components", [])}
    for name, wanted in expected.items():
        component = components.pop(name, {})
        if component.get("version") != wanted:
            found.append(f"{name}: expected {wanted}, got {component.get('version')!r}")
        elif not any(each.get("hashes") for each in component.get("externalReferences", [])):
            found.append(f"{name}: expected a hash, got none")
    return found + [f"{name}: not in {RUNTIME.name}" for name in components]


def write(path: Path) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", str(RUNTIME)]
    command += ["--pyproject", str(PROJECT), "--mc-type", "library", "--validate"]
    subprocess.run([*command, "--output-reproducible", "-o", str(path)], check=True)
    bill = json.loads(path.read_text())
    # The tool does not run our setuptools, which reads the version from the package.
    bill["metadata"]["component"]["version"] = version
    path.write_text(json.dumps(bill, indent=1) + "\n")
    return bill


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "sbom.json"
    expected = locked(RUNTIME.read_text())
    found = problems(write(path), expected)
    print("\n".join(found) or f"batchnorm_cuda {version} and {len(expected)} components: {path}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
