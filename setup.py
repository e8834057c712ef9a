"""Builds `copd_kernels._C` from csrc/ with ninja: the CPU part wherever there is a C++ compiler, CUDA where nvcc is.

COPD_CUDA=0 leaves the CUDA part out, 1 demands it, auto (default) builds it where nvcc is found. COPD_SANITIZE=1 adds
-fsanitize=address,undefined to the CPU part. Without a C++ compiler the package installs as pure Python.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent.resolve() / "csrc"
# one object an instruction set, chosen at run time
ISAS = {"plain": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS |= {"avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"}
ARCHITECTURES = {"80": "80", "90a": "90a", "100": "100"}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def ninja_file(cxx: str, nvcc: str | None, output: Path) -> str:
    import pybind11

    flags = "-std=c++20 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra -Wno-psabi"
    link = ""
    if os.environ.get("COPD_SANITIZE") == "1":
        flags, link = (
            f"{flags} -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
            "-fsanitize=address,undefined",
        )
    includes = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES)
    lines = [
        "rule cxx",
        f"  command = {cxx} {flags} -MMD -MF $out.d $options -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        # nvcc knows where its static runtime is
        f"  command = {nvcc} -shared -cudart static -Xcompiler -fopenmp $in -o $out"
        if nvcc
        else f"  command = {cxx} -shared -fopenmp {link} $in -o $out",
    ]
    objects = [f"rows_{isa}.o" for isa in ISAS]
    lines += [
        f"build rows_{isa}.o: cxx {CSRC / 'rows_cpu.cpp'}\n  options = -DCOPD_ISA={isa} {march}"
        for isa, march in ISAS.items()
    ]
    options = "-DCOPD_X86" if len(ISAS) > 1 else ""
    if nvcc:
        options, objects = f"{options} -DCOPD_CUDA", [*objects, "rows_cuda.o"]
        strict = "-Xptxas -warn-spills,-warn-lmem-usage,-Werror"
        lines += [
            "rule nvcc",
            f"  command = {nvcc} -std=c++20 -O3 --threads 2 -DCOPD_ISA=cuda -Xcompiler -fPIC,-fvisibility=hidden"
            f" {strict} {codes} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            f"build rows_cuda.o: nvcc {CSRC / 'rows_cuda.cu'}",
        ]
    lines += [
        f"build bindings.o: cxx {CSRC / 'bindings.cpp'}\n  options = {options} {includes}",
        f"build {output}: link bindings.o {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


class Ninja(build_ext):
    def build_extension(self, extension: Extension) -> None:
        wanted, cxx, nvcc = (
            os.environ.get("COPD_CUDA", "auto"),
            os.environ.get("CXX") or shutil.which("c++"),
            find_nvcc(),
        )
        if wanted not in ("0", "1", "auto"):
            raise RuntimeError(f"COPD_CUDA must be 0, 1 or auto; got {wanted!r}")
        if wanted == "1" and nvcc is None:
            raise RuntimeError(
                "COPD_CUDA=1 needs nvcc on PATH or in CUDA_HOME; install the CUDA toolkit, or set COPD_CUDA=0"
            )
        if cxx is None:
            print("copd_kernels: no C++ compiler found, so `backend='native'` is left out", file=sys.stderr)
            return
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve()
        for path in (output.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(cxx, None if wanted == "0" else nvcc, output))
        subprocess.run([shutil.which("ninja") or "ninja", "-C", str(folder)], check=True)


setup(
    packages=find_packages(include=["copd", "copd.*", "copd_kernels", "copd_kernels.*"]),
    ext_modules=[Extension("copd_kernels._C", [])],
    cmdclass={"build_ext": Ninja},
)
