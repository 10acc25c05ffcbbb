"""Peak memory of a stretch of a run: of this process, and of its accelerator."""

from __future__ import annotations

from pathlib import Path

import torch


class PeakMemory:
    """A context; afterwards ``bytes`` has ``host``, the process's peak resident size (None where the system does not
    tell), and on CUDA ``device``, the peak of what tensors took."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: dict[str, int | None] = {}

    def __enter__(self) -> PeakMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts again here
        except OSError:
            pass  # then it is the peak since the process began
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes["host"] = _high_water_mark()
        if self.device.type == "cuda":
            self.bytes["device"] = torch.cuda.max_memory_allocated(self.device)


def peak_bytes(device: torch.device) -> int | None:
    """Since the process began: on CUDA the peak of what tensors took, elsewhere of the process's resident size."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water_mark()


def _high_water_mark() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
