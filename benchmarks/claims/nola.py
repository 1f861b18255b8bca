"""NOLA's claim: fewer trained numbers than LoRA of rank 1, and more accuracy for as many.

The hidden layers of an MLP (64-128-128) learn digits turned by 90 degrees: LoRA of rank 1 trains 448 numbers.
"""

from __future__ import annotations

from protocol import Contender, Setting, arguments, compare

LRS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)

if __name__ == "__main__":
    nola = {"rank": 4, "alpha": 4.0}
    compare(
        "nola",
        [
            Contender("LoRA r=1 (448)", "lora", {"rank": 1}),
            *(Contender(f"NOLA k={k} ({4 * k})", "nola", {**nola, "num_basis": k}) for k in (32, 64, 112)),
            Contender("NOLA k=112, no A0", "nola", {**nola, "num_basis": 112, "anchor": False}),
        ],
        seeds=arguments(__doc__).seeds,
        lrs=LRS,
        setting=Setting(steps=600, batch=128),
        note="paper: at equal numbers NOLA is above LoRA, and its accuracy rises with k",
    )
