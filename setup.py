"""Pure by default: the kernels' sources are shipped and compiled at their first use on a GPU.

`BATCHNORM_CUDA_AOT=1 pip install --no-build-isolation .` compiles them now, for a default list or
TORCH_CUDA_ARCH_LIST; it needs torch and a CUDA toolkit but no GPU, and never leaves them out.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "batchnorm_cuda"))  # the package itself needs torch
from _build.archs import select  # noqa: E402
from _build.toolkit import ToolkitError, compiler_version, resolve_toolkit  # noqa: E402

sys.path.pop(0)


def ahead_of_time() -> dict:
    """The `_C` extension and the command that builds it, or an exit that says what is missing."""
    try:
        import torch
    except ImportError as error:
        sys.exit(
            "BATCHNORM_CUDA_AOT=1 compiles against the installed torch, which cannot be imported "
            f"({error}): install it, then `BATCHNORM_CUDA_AOT=1 pip install --no-build-isolation .`"
        )
    if torch.version.cuda is None:
        sys.exit(f"BATCHNORM_CUDA_AOT=1 needs a CUDA build of torch, not {torch.__version__}")
    try:
        compiler_version()
        toolkit = resolve_toolkit(torch.version.cuda)
        explicit = os.environ.get("TORCH_CUDA_ARCH_LIST")
        archs = select(explicit, [], toolkit.gpu_codes())
    except (ToolkitError, ValueError) as error:
        sys.exit(f"BATCHNORM_CUDA_AOT=1: {error}")
    # For these and no others, whatever GPU is here.
    os.environ |= {"CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": ";".join(archs)}
    sys.path.insert(0, str(ROOT))
    from batchnorm_cuda._build.ahead_of_time import build_into

    class Build(build_ext):
        def build_extension(self, extension: Extension) -> None:
            module = Path(self.get_ext_fullpath(extension.name))
            build_into(module.parent, module.name, archs)

    return {
        "ext_modules": [Extension("batchnorm_cuda._C", sources=[])],
        "cmdclass": {"build_ext": Build},
    }


setup(
    packages=[
        "batchnorm_cuda",
        "batchnorm_cuda._build",
        "batchnorm_cuda._explain",
        "batchnorm_cuda._fusion",
        "batchnorm_cuda._models",
        "batchnorm_cuda._ops",
        "batchnorm_cuda.csrc",
        "batchnorm_cuda.simt",
    ],
    package_dir={"batchnorm_cuda.csrc": "csrc", "batchnorm_cuda.simt": "tests/simt"},
    include_package_data=False,  # only the files named here
    package_data={
        "batchnorm_cuda": ["py.typed", "*.pyi"],
        "batchnorm_cuda.csrc": ["*.cpp", "*.h", "*/*.cpp", "*/*.cu", "*/*.cuh", "*/*.h"],
        "batchnorm_cuda.simt": ["*.cpp", "*.h", "torch/*.cpp", "include/*.h", "include/*/*.h"],
    },
    **(ahead_of_time() if os.environ.get("BATCHNORM_CUDA_AOT") == "1" else {}),
)
