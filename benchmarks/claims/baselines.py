"""LoRA, rsLoRA, DoRA, LoRA-XS and VeRA against training every weight, on digits that turn.

python benchmarks/claims/baselines.py --seeds 5
"""

from __future__ import annotations

from protocol import LRS, Contender, Setting, arguments, compare

WIDE = (*LRS, 3e-1)  # few trained numbers want high rates

CONTENDERS = [
    Contender("full", "full", lrs=(3e-4, *LRS)),
    Contender("LoRA r=1", "lora", {"rank": 1}),
    Contender("LoRA r=8", "lora", {"rank": 8}),
    Contender("LoRA r=32, alpha=8", "lora", {"rank": 32, "alpha": 8.0}),
    Contender("rsLoRA r=32, alpha=8", "lora", {"rank": 32, "alpha": 8.0, "scaling": "rslora"}),
    Contender("DoRA r=1", "dora", {"rank": 1}),
    Contender("DoRA r=8", "dora", {"rank": 8}),
    Contender("LoRA-XS r=8", "lora-xs", {"rank": 8}, lrs=WIDE),
    Contender("LoRA-XS r=32", "lora-xs", {"rank": 32}, lrs=WIDE),
    Contender("VeRA r=64", "vera", {"rank": 64}, lrs=WIDE),
]

if __name__ == "__main__":
    compare("baselines", CONTENDERS, seeds=arguments(__doc__).seeds, setting=Setting(steps=300))
