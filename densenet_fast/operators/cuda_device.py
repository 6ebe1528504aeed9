"""Which GPUs the compiled CUDA kernels can run on, why others cannot, and calling the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from densenet_fast.operators import extension
from densenet_fast.operators.extension import GET_CUDA

OLDEST = (7, 5)
_cudnn: Any = torch.backends.cudnn
_JETSON = {(8, 7)}  # runs no binaries of the same generation's other devices


def architectures() -> list[str]:
    """Compute capabilities compiled in: "8.0", "12.0+PTX"; none without kernels."""
    return extension.CUDA.architectures().split(";") if extension.CUDA is not None else []


def covers(compiled: str, capability: tuple[int, int]) -> bool:
    """Whether code for `compiled` runs on a device: the same generation, or as PTX a newer one."""
    number, _, ptx = compiled.partition("+")
    major, minor = map(int, number.rstrip("af").split("."))
    if ptx and capability >= (major, minor) and not number.endswith(("a", "f")):
        return True
    if number.endswith("a") or capability in _JETSON:
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def obstacle(index: int | None = None) -> str | None:
    """Why the kernels cannot run on this device (the current one by default), or None."""
    module = extension.CUDA
    if module is None:
        return extension.CUDA_ERROR
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: there is no GPU or no driver for it"
    runtime, driver = module.runtime_version() // 1000, module.driver_version()
    if driver // 1000 < runtime:
        return (
            f"the kernels were built with CUDA {runtime}, and the GPU's driver knows CUDA "
            f"{driver // 1000}.{driver % 1000 // 10} only: update the driver, or use a toolkit of "
            f"CUDA {driver // 1000} and {GET_CUDA}"
        )
    capability = torch.cuda.get_device_capability(index)
    if any(covers(compiled, capability) for compiled in architectures()):
        return None
    has = f"{torch.cuda.get_device_name(index)} has compute capability {_text(capability)}"
    if capability < OLDEST:
        return f"{has}, the CUDA kernels need {_text(OLDEST)} or newer"
    return (
        f"{has}, the CUDA kernels were compiled for {', '.join(architectures())}: set "
        f"TORCH_CUDA_ARCH_LIST={_text(capability)} and {GET_CUDA}"
    )


def allow_tf32() -> bool:
    """Whether PyTorch's own convolutions of float32 may use tf32 tensor cores now."""
    return bool(_cudnn.conv.fp32_precision == "tf32")


def run_on_cuda(
    kernel: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Call an operator's kernel; its lack of memory is PyTorch's error."""
    module = extension.CUDA
    assert module is not None
    try:
        kernel(*args, **kwargs)
    except RuntimeError as error:
        # Through the stable interface it arrives without its type, and under some torch its text.
        what = module.take_failed_allocation()
        if what:
            raise torch.OutOfMemoryError(what) from error
        raise


def _text(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
