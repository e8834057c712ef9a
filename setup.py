"""Builds `copd_kernels._C` from csrc/ with ninja: the CPU part wherever there is a C++ compiler, CUDA where nvcc is.

COPD_CUDA=0 leaves the CUDA part out, 1 demands it, auto (default) builds it where nvcc is found. COPD_SANITIZE=1 builds
the CPU part with -fsanitize=address,undefined. Without a C++ compiler the package installs as pure Python.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent.resolve() / "csrc"
# one object an instruction set, chosen at run time
X86 = {"avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4 -Wno-uninitialized -Wno-maybe-uninitialized"}
ISAS = {"plain": ""} | (X86 if platform.machine().lower() in ("x86_64", "amd64") else {})
# g++ 12 takes what its own intrinsics leave undefined for a mistake
AMX = "-march=x86-64-v4 -mamx-tile -mamx-bf16 -mavx512bf16 -Wno-uninitialized -Wno-maybe-uninitialized"
ARCHITECTURES = ("80", "90a", "100")

RULES = """
rule cxx
  command = {cxx} -std=c++20 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra -Wno-psabi {sanitize} $options $
    -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule nvcc
  command = {nvcc} -std=c++20 -O3 --threads 2 -Xcompiler -fPIC,-fvisibility=hidden -DCOPD_ISA=cuda {codes} $
    -Xptxas -warn-spills,-warn-lmem-usage,-Werror -MD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = {link} $in -o $out
"""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def takes(cxx: str, options: str) -> bool:
    command = [*shlex.split(cxx), *options.split(), "-fsyntax-only", "-x", "c++", "-"]
    return not subprocess.run(command, input=b"", capture_output=True).returncode


def ninja_file(cxx: str, nvcc: str | None, output: Path) -> str:
    import pybind11

    sanitize = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    sanitize = sanitize if os.environ.get("COPD_SANITIZE") == "1" else ""
    options = f"-I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    amx = len(ISAS) > 1 and sys.platform == "linux" and takes(cxx, AMX)
    options += " -DCOPD_X86" * (len(ISAS) > 1) + " -DCOPD_AMX" * amx + " -DCOPD_CUDA" * bool(nvcc)
    objects = {"bindings.o": ("cxx", "bindings.cpp", options)}
    objects |= {f"rows_{isa}.o": ("cxx", "rows_cpu.cpp", f"-DCOPD_ISA={isa} {march}") for isa, march in ISAS.items()}
    if amx:
        objects["gemm_amx.o"] = ("cxx", "gemm_amx.cpp", AMX)
    link, codes = f"{cxx} -shared -fopenmp {sanitize}", ""
    if nvcc:
        objects["rows_cuda.o"] = ("nvcc", "rows_cuda.cu", "")
        known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
        ours = [a for a in ARCHITECTURES if f"sm_{a.removesuffix('a')}" in known]
        codes = " ".join(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ours)
        # nvcc knows where its static runtime is
        link = f"{nvcc} -shared -cudart static -Xcompiler -fopenmp"
    rules = RULES.format(cxx=cxx, nvcc=nvcc, sanitize=sanitize, codes=codes, link=link)
    builds = [f"build {out}: {rule} {CSRC / source}\n  options = {o}" for out, (rule, source, o) in objects.items()]
    return "\n".join([rules, *builds, f"build {output}: link {' '.join(objects)}", ""])


class Ninja(build_ext):
    def build_extension(self, extension: Extension) -> None:
        cuda, nvcc, cxx = os.environ.get("COPD_CUDA", "auto"), find_nvcc(), os.environ.get("CXX") or shutil.which("c++")
        if cuda not in ("0", "1", "auto"):
            raise RuntimeError(f"COPD_CUDA must be 0, 1 or auto; got {cuda!r}")
        if cuda == "1" and nvcc is None:
            raise RuntimeError("COPD_CUDA=1 needs nvcc on PATH or in CUDA_HOME; install it, or set COPD_CUDA=0")
        if cxx is None:
            print("copd_kernels: no C++ compiler found, so `backend='native'` is left out", file=sys.stderr)
            return
        output, folder = Path(self.get_ext_fullpath(extension.name)).resolve(), Path(self.build_temp).resolve()
        for path in (output.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(cxx, None if cuda == "0" else nvcc, output))
        if subprocess.run([shutil.which("ninja") or "ninja", "-C", str(folder)]).returncode:
            raise RuntimeError("csrc/ does not build (see above); COPD_CUDA=0 leaves its CUDA part out")


setup(
    packages=find_packages(include=["copd", "copd.*", "copd_kernels", "copd_kernels.*"]),
    ext_modules=[Extension("copd_kernels._C", [])],
    cmdclass={"build_ext": Ninja},
)
