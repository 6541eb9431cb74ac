"""The CUDA toolkit and the kernels' source files, for tools that work without PyTorch.

Loads the package's own helpers by their paths, because importing the package imports torch.
`python -m bench.toolkit nvcc|cudart|gencode|sources` prints one of them for a Makefile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .loading import load

archs = load("batchnorm_cuda", "_archs")
devices = load("batchnorm_cuda", "devices")
sources = load("batchnorm_cuda", "_sources")
toolkit = load("batchnorm_cuda", "_toolkit")
Toolkit = toolkit.Toolkit
ToolkitError = toolkit.ToolkitError

NVDISASM_HINT = "`pip install nvidia-cuda-nvdisasm` fetches it, or put NVIDIA's own on PATH"


def resolve() -> Toolkit:
    """Any CUDA toolkit: nothing here links with PyTorch. Raises ToolkitError."""
    return toolkit.resolve_toolkit(None)


def find_nvdisasm(home: Path) -> Path:
    """The disassembler of the toolkit at `home`, of PyPI or on PATH. Raises ToolkitError."""
    candidates = [home / "bin" / "nvdisasm"]
    for entry in sys.path:
        candidates += sorted(Path(entry or ".").glob("nvidia/cu*/bin/nvdisasm"), reverse=True)
    on_path = shutil.which("nvdisasm")
    candidates += [Path(on_path)] if on_path else []
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    raise ToolkitError(f"no nvdisasm in {home / 'bin'}, from PyPI or on PATH: {NVDISASM_HINT}")


def visible_gpus() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs in this machine, as the driver's own tool lists them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.split() if done.returncode == 0 else []
    return [archs.capability(line) for line in lines if line[0].isdigit()]


def gencode(kit: Toolkit) -> list[str]:
    """nvcc flags for TORCH_CUDA_ARCH_LIST, else for the GPUs present, else for the defaults."""
    explicit = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return archs.gencode(archs.select(explicit, visible_gpus(), kit.gpu_codes()))


def main(wanted: str) -> int:
    if wanted == "sources":
        print(*(path.name for path in sources.kernel_sources()))
        return 0
    try:
        kit = resolve()
    except ToolkitError as error:
        print(error, file=sys.stderr)
        return 1
    answers = {"nvcc": lambda: [kit.nvcc], "cudart": lambda: [kit.cudart]}
    answers["gencode"] = lambda: gencode(kit)
    print(*answers[wanted]())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
