"""Prints which backends this machine has, and why not the others: `python -m copd_kernels`."""

import torch

from . import __version__
from .rows import BACKENDS, missing, resolve


def main() -> None:
    print(f"copd_kernels {__version__}, torch {torch.__version__}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"\n{device} ({name})")
        for backend in BACKENDS:
            reason = missing(backend, device)
            default = ", the default" if reason is None and backend == resolve("", None, device) else ""
            print(f"  {backend:8}{'no: ' + reason if reason else 'yes' + detail(backend, device) + default}")
    if len(devices) == 1:
        print("\nno CUDA device")


def detail(backend: str, device: torch.device) -> str:
    if backend != "native" or device.type != "cpu":
        return ""
    from . import _C  # type: ignore[attr-defined]  # compiled

    return f" ({_C.isa()}{', CUDA part built' if _C.has_cuda else ', no CUDA part'})"


if __name__ == "__main__":
    main()
