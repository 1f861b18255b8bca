"""SALT against LoRA of as many trained numbers, and scale and shift alone, on 300 digits transposed and inverted.

python benchmarks/claims/salt.py --seeds 5

The first layer has 64 singular values, the second 128: as many as `top` are scaled and shifted. In "scale and shift"
all of them are.
"""

from __future__ import annotations

from protocol import Contender, Setting, arguments, compare

HIGH = (1e-2, 3e-2, 1e-1, 3e-1)

CONTENDERS = [
    Contender("full", "full", lrs=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    Contender("LoRA r=2", "lora", {"rank": 2}),
    Contender("LoRA r=3", "lora", {"rank": 3}),
    Contender("scale and shift", "salt", {"top": 128}, lrs=HIGH),
    Contender("SALT top=32 q=4", "salt", {"top": 32, "rank": 4}),
    Contender("SALT top=48 q=4", "salt", {"top": 48, "rank": 4}),
    Contender("SALT top=32 q=4, diag", "salt", {"top": 32, "rank": 4, "relu": "diag"}),
    Contender("SALT top=32 q=4, none", "salt", {"top": 32, "rank": 4, "relu": "none"}),
]

if __name__ == "__main__":
    compare("salt", CONTENDERS, seeds=arguments(__doc__).seeds, setting=Setting(change="inverted", samples=300))
