"""The memory that a run is said to take."""

from __future__ import annotations

import platform

import pytest
import torch

from fallow.recipes.progress import forget_peak, memory_now, peak_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives back what is free when asked")
def test_what_was_freed_before_a_run_is_not_counted_as_its_memory():
    device = torch.device("cpu")
    forget_peak(device)
    before = memory_now(device)
    held = [b"x" * 60_000 + bytes([n % 256]) for n in range(2_000)]  # 120 MB below malloc's threshold for mmap
    last = b"y" * 60_000 + bytes([len(held) % 256])  # above them on the heap, so that it does not shrink by itself
    del held
    forget_peak(device)
    peak, told = peak_memory(device)
    assert len(last) == 60_001
    assert peak is not None
    assert peak - before < 40e6
    assert "whole process" in told
