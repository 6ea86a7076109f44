# SPDX-License-Identifier: Apache-2.0
"""Whether a server on a CPU can compile, which it does while it serves.

vLLM leaves small functions of its sampler to torch.compile, which compiles C++ on a CPU when a request first
needs them: log-probabilities do, and so does every region that the served model finds. Where that fails the
engine ends, long after `/health` has answered. So it is tried before.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from vllm_crop.errors import MissingCompilerError

# What torch includes in all that it compiles for a CPU.
_TRIAL = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
_TIMEOUT_S = 60.0
_WHY = "vLLM compiles C++ while it serves on a CPU, and its engine ends with the first request that needs it"


def require_compiler() -> None:
    """Compile something as torch will, if this vLLM runs on a CPU; takes a few tenths of a second.

    Raises:
        MissingCompilerError: saying what to install or to set.
    """
    from vllm.platforms import current_platform

    # torch reads the variable so, when it is imported.
    if current_platform.is_cpu() and os.environ.get("TORCH_COMPILE_DISABLE", "0") != "1":
        try_compiler()


def try_compiler() -> None:
    """Compile and link a few lines with the compiler and in the folder that torch uses.

    Raises:
        MissingCompilerError: saying what to install or to set.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            compiler = get_cpp_compiler()
            said = _compile(compiler, Path(folder) / "trial.so")
    except InvalidCxxCompiler:
        raise MissingCompilerError(
            f"no C++ compiler was found. {_WHY}: install one (Debian and Ubuntu: apt-get install g++), or "
            "name it in CXX"
        ) from None
    except OSError as error:
        raise MissingCompilerError(
            f"torch cannot write what it compiles: {error}. {_WHY}: set TORCHINDUCTOR_CACHE_DIR to a folder "
            "that can be written to"
        ) from None
    if said is None:
        return
    install = "that compiler has to be mended, or another one named in CXX"
    if "Python.h" in said:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        install = f"install the headers of Python {version} (Debian and Ubuntu: apt-get install python3-dev)"
    raise MissingCompilerError(f"{compiler} cannot compile for this Python: {said}. {_WHY}: {install}")


def _compile(compiler: str, target: Path) -> str | None:
    """The first error of the compiler, if there is one."""
    headers = sysconfig.get_path("include", scheme="posix_prefix")
    options = ("-shared", "-fPIC", "-fopenmp", f"-I{headers}", "-o", str(target))
    try:
        finished = subprocess.run(
            [compiler, "-x", "c++", "-", *options],
            input=_TRIAL,
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"it has not finished within {_TIMEOUT_S:.0f} s"
    if finished.returncode == 0:
        return None
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[-1] if lines else "without a word")
