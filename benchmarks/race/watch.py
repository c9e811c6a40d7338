"""The device's memory as its driver tells, from outside the process that is timed."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

_EVERY_S = 0.02


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong),
                ("used", ctypes.c_ulonglong))  # fmt: skip


class DeviceWatch:
    """NVML's figure of memory in use, sampled by a thread here; None where there is no NVML."""

    def __init__(self, uuid: str | None) -> None:
        self._library: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        if uuid is None:
            return
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if (
                library.nvmlInit_v2() == 0
                and library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(self._handle))
                == 0
            ):
                self._library = library

    def used(self) -> int | None:
        """Bytes in use now, by everybody."""
        if self._library is None:
            return None
        memory = _Memory()
        if self._library.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) != 0:
            return None
        return int(memory.used)

    @contextlib.contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Hold a list that ends with one number: how far use rose above that at the beginning."""
        risen: list[int] = []
        before = self.used()
        if before is None:
            yield risen
            return
        highest = before
        over = threading.Event()

        def look() -> None:
            nonlocal highest
            while not over.wait(_EVERY_S):
                highest = max(highest, self.used() or 0)

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        try:
            yield risen
        finally:
            over.set()
            looker.join()
            risen.append(highest - before)
