"""LoLDU's ranks and starts against LoRA, and the official code's wrecked start, on 300 digits transposed and inverted.

python benchmarks/claims/loldu.py --seeds 5

"ones, wrecked" starts as the official code does with `ones`: the residual weight leaves out the diagonal D, while the
branch holds ones.
"""

from __future__ import annotations

import torch
from protocol import Contender, Setting, arguments, compare
from torch import Tensor

from fallow.core.bases import ldu
from fallow.core.delta import Site
from fallow.deltas.loldu import LoLDU

HIGH = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)


class Wrecked(LoLDU):
    name = "loldu-wrecked"
    starts = "the residual is made with D, the branch starts at ones"
    D: Tensor

    def setup(self, site: Site) -> None:
        super().setup(site)
        self.register_buffer("D", ldu(site.weight())[1])

    def gates(self) -> Tensor:
        return self.scale * self.z - self.D

    @torch.no_grad()
    def randomize(self) -> None:
        self.z.normal_()


CONTENDERS = [
    Contender("LoRA r=1", "lora", {"rank": 1}),
    *(Contender(f"LoLDU full, {init}", "loldu", {"init": init}, {"scale": 0.1}, HIGH)
      for init in ("uniform", "lu", "ones", "zeros")),
    Contender("LoLDU full, frozen scale", "loldu", {"train_scale": False}, lrs=HIGH),
    Contender("LoLDU full, normalized", "loldu", {"normalize": True}, {"scale": 0.1}, HIGH),
    Contender("ones, wrecked", "loldu-wrecked", {"init": "ones"}, {"scale": 0.1}, HIGH),
    Contender("LoLDU r=16", "loldu", {"rank": 16}, {"scale": 0.1}, HIGH),
]  # fmt: skip

if __name__ == "__main__":
    compare("loldu", CONTENDERS, seeds=arguments(__doc__).seeds, setting=Setting(change="inverted", samples=300))
