"""What each extension is compiled from and with, and every ingredient of its cache key."""

from __future__ import annotations

import os
import sysconfig
from typing import TypeAlias

import torch

from .._version import __version__
from . import sources
from .archs import covers, select
from .compile import BuildError, Recipe, quoted
from .jobs import HOST_JOB_BYTES
from .kernels import KernelRecipe
from .toolkit import Toolkit, compiler_version, resolve_toolkit

AnyRecipe: TypeAlias = Recipe | KernelRecipe


def all_cuda_recipes(*, any_gpu: bool = False) -> list[AnyRecipe]:
    """`_C` and the kernels of every table."""
    kernels = [kernel_recipe(table, any_gpu=any_gpu) for table in sources.KERNEL_TABLES]
    return [cuda_recipe(any_gpu=any_gpu), *kernels]


def cuda_recipe(*, any_gpu: bool = False) -> Recipe:
    """`_C`, which has no kernels of its own: the same for all GPUs."""
    toolkit, archs = cuda_target(any_gpu)
    files = sources.cuda_host_sources()
    headers = [f"-isystem {quoted(str(path))}" for path in toolkit.extra_include_dirs]
    return Recipe(
        name="_C",
        label=f"the CUDA extension (torch {torch.__version__}, CUDA {toolkit.version})",
        sources=files,
        cflags=[*sources.CXX_FLAGS, *headers],
        links={"libcudart.so": toolkit.cudart} if toolkit.lacks_linker_name else {},
        with_cuda=True,
        # torch asks for a list of architectures, though nothing is compiled for one.
        environment={"CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": ";".join(archs)},
        job_bytes=HOST_JOB_BYTES,
        key=_common_key()
        | {"sources": sources.closure_hash(files, [], lines=True), "cuda": toolkit.version},
    )


def kernel_recipe(table: str, *, any_gpu: bool = False) -> KernelRecipe:
    """The kernels of one table for the GPUs of this machine, or for TORCH_CUDA_ARCH_LIST."""
    return KernelRecipe.of(table, *cuda_target(any_gpu))


def cuda_target(any_gpu: bool) -> tuple[Toolkit, list[str]]:
    """The toolkit, and the architectures for the GPUs of this machine or TORCH_CUDA_ARCH_LIST.

    Unless it is for any GPU, a list that leaves out the one that is here is an error.
    """
    require_cuda_torch()
    toolkit = resolve_toolkit(torch.version.cuda)
    explicit = os.environ.get("TORCH_CUDA_ARCH_LIST")
    visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    # "native" is cpp_extension's word for the GPUs present, which is the default here.
    listed = None if explicit == "native" else explicit
    archs = select(listed, visible, toolkit.gpu_codes())
    problem = None if any_gpu else uncovered_gpu(archs)
    if problem and explicit:
        raise BuildError(f"{problem} (TORCH_CUDA_ARCH_LIST={explicit!r}): add it or unset it")
    if problem:
        raise BuildError(
            f"{problem}, what CUDA {toolkit.version}'s compiler can generate: such a GPU needs an "
            "older PyTorch and CUDA toolkit"
        )
    return toolkit, archs


def emulated_recipe() -> Recipe:
    """`_C_emulated`: the same sources for the CPU, against the headers of tests/simt/include."""
    kernels = KernelRecipe.emulated()
    return Recipe(
        name="_C_emulated",
        label=f"the kernels' CPU emulation (torch {torch.__version__})",
        sources=sources.emulated_cpp_sources(),
        kernels=kernels,
        include_dirs=kernels.include_dirs,
        cflags=[*sources.CXX_FLAGS, *sources.EMULATED_FLAGS],
        job_bytes=HOST_JOB_BYTES,
        key=_common_key()
        | {"sources": sources.content_hash(emulated=True), "cpu": kernels.key["cpu"]},
    )


def require_cuda_torch() -> None:
    if torch.version.cuda is None:
        raise BuildError(
            f"PyTorch {torch.__version__} is a build without CUDA, and the kernels need one with: "
            "`pip install --force-reinstall torch`, with the index that PyTorch's installation "
            "page names for your CUDA version"
        )


def uncovered_gpu(archs: list[str]) -> str | None:
    """Names the current GPU and the list if nothing in the list runs on it."""
    if not torch.cuda.is_available():
        return None
    gpu = torch.cuda.get_device_capability()
    if covers(archs, gpu):
        return None
    return (
        f"{torch.cuda.get_device_name()} has compute capability {gpu[0]}.{gpu[1]}, which is not "
        f"covered by {';'.join(archs)}"
    )


def _common_key() -> dict[str, str]:
    """What every build depends on, apart from its sources."""
    return {
        "version": __version__,
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda or "none",
        "python": str(sysconfig.get_config_var("SOABI")),
        "compiler": compiler_version(),
    }
