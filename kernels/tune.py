"""``python -m fastode.kernels.tune``: measure how many warps per program suit which size, on this machine's GPU.

Writes ``tuned.json`` beside the kernels, by device name and bit length of the number of elements; ``combine`` reads it
when it is first used. Never run on the path of a request.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

from fastode.kernels.combine import combine

CHOICES = (1, 2, 4, 8)
BITS = range(10, 31)


def milliseconds(elements: int, warps: int, repeats: int = 20) -> float:
    """Median time of an update that reads three tensors and writes two, as DPM-Solver++(2M) does."""
    slab = torch.randn((4, 1, elements), device="cuda")
    table = torch.rand(6, device="cuda")
    x, old, out, net_in = slab
    times = []
    for i in range(repeats + 5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        combine([x, net_in], [x, old, out], table, pattern=63, warps=warps)
        end.record()
        end.synchronize()
        if i >= 5:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def tune() -> dict[int, int]:
    """bit length of the number of elements -> the fastest number of warps."""
    best = {}
    for bits in BITS:
        elements = 3 << (bits - 2)  # the middle of what has this bit length, and divisible by 4
        if 4 * 4 * elements > 0.8 * torch.cuda.mem_get_info()[0]:
            break
        times = {warps: milliseconds(elements, warps) for warps in CHOICES}
        best[bits] = min(times, key=times.__getitem__)
    return best


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("fastode.kernels.tune: needs a CUDA device")
    path = Path(__file__).with_name("tuned.json")
    record = json.loads(path.read_text()) if path.exists() else {}
    record[torch.cuda.get_device_name()] = tune()
    path.write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"{path}: {record[torch.cuda.get_device_name()]}\n")


if __name__ == "__main__":
    main()
