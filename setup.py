"""Pure by default: the kernels' sources are shipped and compiled at their first use on a GPU.

`BATCHNORM_CUDA_AOT=1 pip install --no-build-isolation .` compiles them now, for a default list or
TORCH_CUDA_ARCH_LIST; it needs torch and a CUDA toolkit but no GPU, and never leaves them out.
"""

import json
import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "batchnorm_cuda"))  # the package itself needs torch
import _archs  # noqa: E402
import _jobs  # noqa: E402
import _sources  # noqa: E402
import _toolkit  # noqa: E402

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
        _toolkit.compiler_version()
        toolkit = _toolkit.resolve_toolkit(torch.version.cuda)
        explicit = os.environ.get("TORCH_CUDA_ARCH_LIST")
        archs = ";".join(_archs.select(explicit, [], toolkit.gpu_codes()))
    except (_toolkit.ToolkitError, ValueError) as error:
        sys.exit(f"BATCHNORM_CUDA_AOT=1: {error}")
    jobs = str(_jobs.compile_jobs(_jobs.CUDA_JOB_BYTES))
    os.environ |= {"CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": archs, "MAX_JOBS": jobs}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    class Build(BuildExtension):
        """Also records what the binary is tied to, for the check at its loading."""

        def run(self) -> None:
            super().run()
            module = Path(self.get_ext_fullpath("batchnorm_cuda._C"))
            record = {
                "torch": torch.__version__,
                "cuda": toolkit.version,
                "archs": archs.split(";"),
            }
            record["sources"] = _sources.content_hash(emulated=False)
            (module.parent / "_aot.json").write_text(json.dumps(record) + "\n")

    extension = CUDAExtension(
        "batchnorm_cuda._C",
        [os.path.relpath(path, ROOT) for path in _sources.cuda_sources()],
        include_dirs=[str(path) for path in toolkit.extra_include_dirs],
        library_dirs=[str(toolkit.linker_dir(ROOT / "build" / "cudart"))],
        extra_compile_args={"cxx": [*_sources.CXX_FLAGS], "nvcc": [*_sources.NVCC_FLAGS]},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(
    packages=["batchnorm_cuda", "batchnorm_cuda.csrc", "batchnorm_cuda.simt"],
    package_dir={"batchnorm_cuda.csrc": "csrc", "batchnorm_cuda.simt": "tests/simt"},
    include_package_data=False,  # only the files named here
    package_data={
        "batchnorm_cuda": ["py.typed", "*.pyi"],
        "batchnorm_cuda.csrc": ["*.cpp", "*.cu", "*.cuh", "*.h"],
        "batchnorm_cuda.simt": ["*.cpp", "*.h", "torch/*.cpp", "include/*.h", "include/*/*.h"],
    },
    **(ahead_of_time() if os.environ.get("BATCHNORM_CUDA_AOT") == "1" else {}),
)
