"""WaRA against LoRA of as many numbers (448, 896, 1792), on digits that turn; random transforms as its control.

python benchmarks/claims/wara.py --seeds 5
"""

from __future__ import annotations

import warnings

from protocol import Contender, Setting, arguments, compare

LRS = (3e-3, 1e-2, 3e-2, 1e-1)
RANDOM = "random_orthogonal"
CONTENDERS = [
    *(Contender(f"LoRA r={rank}", "lora", {"rank": rank}) for rank in (1, 2, 4)),
    *(
        Contender(f"feature r={rank} {wavelet}", "wara", {"rank": rank, "wavelet": wavelet})
        for rank in (2, 4, 8) for wavelet in ("haar", "db2", RANDOM)
    ),
    *(Contender(f"weight r={rank} db2", "wara", {"rank": rank, "variant": "weight"}) for rank in (1, 2)),
]  # fmt: skip

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="wavelet='haar'")
    compare("wara", CONTENDERS, seeds=arguments(__doc__).seeds, lrs=LRS, setting=Setting(steps=600))
