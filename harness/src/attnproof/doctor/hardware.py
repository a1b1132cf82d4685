"""The GPUs as NVIDIA's driver describes them, asked through libcuda, without torch.

Source: https://docs.nvidia.com/cuda/cuda-driver-api, cuDeviceGetAttribute.
"""

from __future__ import annotations

import ctypes
from typing import Any

from ..device import Device, driver
from .probing import answers, say

# CUdevice_attribute
SHARED_MEMORY_PER_BLOCK_OPTIN = 97
SHARED_MEMORY_PER_MULTIPROCESSOR = 81
MULTIPROCESSORS = 16
MEMORY_CLOCK = 36  # kHz
MEMORY_BUS_WIDTH = 37  # bits
L2_CACHE = 38
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
NAME_BYTES = 256
TRANSFERS_PER_CLOCK = 2  # double data rate


class DriverError(Exception):
    """The driver is not here, or refuses; the message is one line."""


class CudaDriver:
    """libcuda, initialised."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(f"no NVIDIA driver: {error}") from None
        self._call("cuInit", 0)

    def version(self) -> str:
        """The newest CUDA that the driver runs: "13.0"."""
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def count(self) -> int:
        """How many GPUs CUDA_VISIBLE_DEVICES leaves."""
        number = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(number))
        return number.value

    def gpu(self, index: int) -> dict[str, Any]:
        """Plain values that describe one."""
        handle, memory = ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(NAME_BYTES)
        self._call("cuDeviceGet", ctypes.byref(handle), index)
        self._call("cuDeviceGetName", name, NAME_BYTES, handle)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)

        def attribute(number: int) -> int:
            value = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
            return value.value

        capability = (attribute(CAPABILITY_MAJOR), attribute(CAPABILITY_MINOR))
        clock, width = attribute(MEMORY_CLOCK), attribute(MEMORY_BUS_WIDTH)
        device = Device(
            name=name.value.decode(errors="replace"), capability=capability, memory=memory.value
        )
        return {
            "name": device.name,
            "capability": f"{capability[0]}.{capability[1]}",
            "sm": device.sm,
            "architecture": device.architecture,
            "multiprocessors": attribute(MULTIPROCESSORS),
            "l2_mib": round(attribute(L2_CACHE) / 2**20, 1),
            "shared_memory_per_multiprocessor_kib": (
                attribute(SHARED_MEMORY_PER_MULTIPROCESSOR) // 2**10
            ),
            "shared_memory_per_block_kib": attribute(SHARED_MEMORY_PER_BLOCK_OPTIN) // 2**10,
            "memory_gib": round(memory.value / 2**30, 1),
            "memory_clock_mhz": clock // 1000,
            "memory_bus_bits": width,
            "theoretical_bandwidth_gb_per_s": theoretical_bandwidth(clock, width),
        }

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown error").decode(errors="replace")
            raise DriverError(f"{function}: {said} (CUDA error {status})")


def theoretical_bandwidth(clock_khz: int, bus_bits: int) -> int | None:
    """GB/s of DRAM, from clock and bus width; None where the driver tells neither."""
    return round(TRANSFERS_PER_CLOCK * clock_khz * 1e3 * bus_bits / 8 / 1e9) or None


def main() -> None:
    """Say what is here, and which calls fail."""
    out = answers()
    say(out, {"driver": driver()})
    try:
        found = CudaDriver()
        say(out, {"driver_cuda": found.version()})
        for index in range(found.count()):
            say(out, {"gpu": found.gpu(index)})
    except DriverError as error:
        say(out, {"problem": str(error)})


if __name__ == "__main__":
    main()
