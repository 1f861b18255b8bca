"""SVFit at full and lower rank against LoRA, on 300 digits transposed and inverted.

python benchmarks/claims/svfit.py --seeds 5
"""

from __future__ import annotations

from protocol import Contender, Setting, arguments, compare

HIGH = (1e-2, 3e-2, 1e-1, 3e-1)

CONTENDERS = [
    Contender("full", "full", lrs=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    Contender("LoRA r=1", "lora", {"rank": 1}),
    Contender("LoRA r=4", "lora", {"rank": 4}),
    Contender("SVFit full", "svfit", lrs=HIGH),
    Contender("SVFit full, relative", "svfit", {"relative": True}, lrs=(*HIGH, 1.0)),
    Contender("SVFit r=16", "svfit", {"rank": 16}, lrs=(*HIGH, 1.0)),
]

if __name__ == "__main__":
    compare("svfit", CONTENDERS, seeds=arguments(__doc__).seeds, setting=Setting(change="inverted", samples=300))
