"""The device a kernel is chosen for, as a value: any device can be imagined, none need be present."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """A device type as in `torch.device.type`; for NVIDIA's the compute capability, `(9, 0)` for Hopper, and for AMD's,
    which PyTorch calls "cuda" as well, the architecture, "gfx942" for an MI300."""

    type: str
    capability: tuple[int, int] | None = None
    name: str = ""
    arch: str = ""

    @property
    def platform(self) -> str:
        """What kernels are written for: the device's type, but "rocm" for AMD's."""
        return "rocm" if self.arch else self.type

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The device that a tensor lives on."""
        if device.type != "cuda" or not torch.cuda.is_available():
            return cls(device.type)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return cls("cuda", None, properties.name, properties.gcnArchName.split(":")[0])
        return cls("cuda", (properties.major, properties.minor), properties.name)

    @classmethod
    def current(cls) -> Device:
        """This machine's accelerator, or its CPU."""
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return cls.of(accelerator) if accelerator is not None else cls("cpu")

    @classmethod
    def parse(cls, device: Device | torch.device | str) -> Device:
        """A `Device`, a `torch.device`, or a name: "cpu", "mps", "cuda", …, a compute capability such as "sm_90", or an
        architecture of AMD's such as "gfx942".

        Raises `ValueError` for anything else.
        """
        if isinstance(device, Device):
            return device
        if isinstance(device, torch.device):
            return cls.of(device)
        if isinstance(device, str) and (found := re.fullmatch(r"sm_(\d+)(\d)[af]?", device)):
            return cls("cuda", (int(found[1]), int(found[2])))
        if isinstance(device, str) and re.fullmatch(r"gfx[0-9a-f]{3,4}", device):
            return cls("cuda", arch=device)
        if device == "npu":  # unknown to PyTorch until torch_npu is imported
            return cls("npu")
        try:
            return cls.of(torch.device(device))
        except (RuntimeError, TypeError):
            raise ValueError(
                f"unknown device {device!r}: use a torch device such as 'cpu' or 'cuda:0', a compute capability such "
                "as 'sm_80', 'sm_90' or 'sm_100', or an architecture of AMD's such as 'gfx942'"
            ) from None

    def __str__(self) -> str:
        kind = self.arch or (f"sm_{self.capability[0]}{self.capability[1]}" if self.capability else self.type)
        return kind + (f" ({self.name})" if self.name else "")


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """While kernels that aren't PyTorch's are launched, or timed: they go to the GPU that is the current one, and into
    its stream, wherever their tensors are."""
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.device(device) if on_gpu else nullcontext()
