"""The CUDA toolkit and the kernels' source files, for tools that work without PyTorch.

Loads the package's own helpers by their paths, because importing the package imports torch.
`python -m bench.toolkit nvcc|cudart|sources|plain` prints one of them for a Makefile, and
`python -m bench.toolkit objects|host-objects FOLDER` leaves the compiled kernels there, the latter
with the host model and what of csrc/ it is linked with.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .loading import load, load_package

archs = load_package("_build.archs")
build = load_package("_build.builder")
devices = load("batchnorm_cuda", "devices")
jobs = load_package("_build.jobs")
kernels = load_package("_build.kernels")
sources = load_package("_build.sources")
toolkit = load_package("_build.toolkit")
Toolkit = toolkit.Toolkit
ToolkitError = toolkit.ToolkitError


def resolve() -> Toolkit:
    """Any CUDA toolkit: nothing here links with PyTorch. Raises ToolkitError."""
    return toolkit.resolve_toolkit(None)


def find_tool(name: str, home: Path | None = None) -> Path:
    """nvdisasm or cuobjdump: the toolkit's, PyPI's or on PATH. Raises ToolkitError."""
    candidates = [home / "bin" / name] if home else []
    for entry in sys.path:
        candidates += sorted(Path(entry or ".").glob(f"nvidia/cu*/bin/{name}"), reverse=True)
    on_path = shutil.which(name)
    candidates += [Path(on_path)] if on_path else []
    for candidate in candidates:
        if os.access(candidate, os.X_OK):
            return candidate
    hint = f"`pip install nvidia-cuda-{name}` fetches it, or put NVIDIA's own on PATH"
    place = f"in {home / 'bin'}" if home else "in a toolkit"
    raise ToolkitError(f"no {name} {place}, from PyPI or on PATH: {hint}")


def visible_gpus() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs in this machine, as the driver's own tool lists them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.split() if done.returncode == 0 else []
    return [archs.capability(line) for line in lines if line[0].isdigit()]


def kernel_objects(kit: Toolkit, wanted: list[str]) -> dict[Path, Path]:
    """The compiled objects of all kernels for the architectures, by source: the extension's own."""
    return build.build_objects(
        [kernels.KernelRecipe.of(x, kit, wanted) for x in sources.KERNEL_TABLES]
    )


def plain_sources() -> list[Path]:
    """The C++ files of csrc/ that need no torch: the plan, and what launches kernels."""
    csrc = sources.csrc_dir()
    return sorted([*csrc.glob("*.cpp"), *(csrc / "plan").glob("*.cpp")])


def host_model_recipe() -> kernels.KernelRecipe:
    """Objects of the host model and the plain sources, for all programs without torch."""
    simt = sources.simt_dir()
    flags = ["-std=c++17", "-O1", "-DBATCHNORM_CUDA_HOST_MODEL", "-Wall", "-Wextra", "-Werror"]
    return kernels.KernelRecipe(
        table="host_model",
        label="the host model",
        sources=[*plain_sources(), *sorted(simt.glob("*.cpp"))],
        key={"compiler": toolkit.compiler_version()},
        job_bytes=jobs.HOST_JOB_BYTES,
        compiler=[os.environ.get("CXX", "c++"), *flags],
        include_dirs=[simt, *sources.emulated_include_dirs()],
        lines=True,
    )


def host_model_objects() -> list[Path]:
    return list(build.build_objects([host_model_recipe()]).values())


def host_objects() -> dict[Path, Path]:
    """The kernels for the host model, and all that they run on there."""
    return build.build_objects([kernels.KernelRecipe.emulated(), host_model_recipe()])


def copy_objects(objects: dict[Path, Path], folder: Path) -> None:
    """Leave <source>.o of each in `folder` and nothing else.

    make links when the folder is newer, which an entry that comes or goes makes it; writing into
    a file that is there does not.
    """
    wanted = {folder / f"{source.name}.o": path for source, path in objects.items()}
    for target in set(folder.glob("*.o")) - wanted.keys():
        target.unlink()
    for target, path in wanted.items():
        if not target.exists() or not filecmp.cmp(path, target, shallow=False):
            target.unlink(missing_ok=True)
            shutil.copyfile(path, target)


def cuda_objects(kit: Toolkit) -> dict[Path, Path]:
    """For TORCH_CUDA_ARCH_LIST, else the GPUs here, else the defaults."""
    explicit = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return kernel_objects(kit, archs.select(explicit, visible_gpus(), kit.gpu_codes()))


def main(wanted: str, *folder: str) -> int:
    listed = {"sources": sources.kernel_sources, "plain": plain_sources}
    if wanted in listed:
        print(*(path.name for path in listed[wanted]()))
        return 0
    try:
        if wanted == "host-objects":
            copy_objects(host_objects(), Path(*folder))
            return 0
        kit = resolve()
        if wanted == "objects":
            copy_objects(cuda_objects(kit), Path(*folder))
            return 0
    except (ToolkitError, build.BuildError) as error:
        print(error, file=sys.stderr)
        return 1
    print({"nvcc": kit.nvcc, "cudart": kit.cudart}[wanted])
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
