"""Hydra's two heads together against either alone at like budgets, on digits transposed and inverted.

python benchmarks/claims/hydra.py --seeds 5
"""

from __future__ import annotations

from protocol import Contender, Setting, arguments, compare

CONTENDERS = [
    Contender("both heads, 2 + 2", "hydra", {"rank": 2, "sequential_rank": 2}),
    Contender("both, seeing the bias", "hydra", {"rank": 2, "sequential_rank": 2, "sees_bias": True}),
    Contender("parallel alone, 4", "hydra", {"rank": 4, "sequential_rank": 0}),
    Contender("sequential alone, 3", "hydra", {"rank": 0, "sequential_rank": 3}),
    Contender("LoRA r=4", "lora", {"rank": 4}),
]

if __name__ == "__main__":
    compare("hydra", CONTENDERS, seeds=arguments(__doc__).seeds, setting=Setting(change="inverted"))
