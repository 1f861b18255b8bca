"""Fallow adapts pretrained models at a fraction of the usual memory, time and storage.

    import fallow

    optimizer = fallow.SaRA(model, fraction=0.05)      # in place of torch.optim.AdamW(model.parameters())
    ...
    optimizer.save("style.safetensors")

    fallow.attach(model, "lora", rank=8)               # or another weight parameterization, without PEFT
    fallow.save(model, "style")

The names are imported when first used, so that `import fallow` and the command line's help cost no seconds. PEFT
learns of the adapters of this package (`SaRAConfig`, `SHiRAConfig`) as soon as both are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fallow.core.on_import import after_import

if TYPE_CHECKING:
    from fallow.budgets.adalora import AdaLoRARanks
    from fallow.budgets.colora import CoLoRARanks
    from fallow.budgets.diffora import DiffoRARanks
    from fallow.budgets.eva import EVARanks
    from fallow.budgets.increlora import IncreLoRA
    from fallow.budgets.lamda import LaMDARanks
    from fallow.budgets.uniform import Uniform
    from fallow.catalogue import Card, methods
    from fallow.core.accompany import condition, penalty
    from fallow.core.delta import Delta, MethodOptions
    from fallow.core.errors import (
        AdapterError,
        ConfigError,
        DataError,
        FallowError,
        ModelError,
        SelectionError,
        TrainingError,
    )
    from fallow.core.gradients import check_gradients
    from fallow.core.host import (
        activate,
        detach,
        disabled,
        merge,
        mixed,
        save,
        set_scale,
        unmerge,
    )
    from fallow.core.objective import Objective
    from fallow.core.peft_host import config_of
    from fallow.core.peft_host.hotswap import hotswap
    from fallow.core.probe import probe, probe_bytes
    from fallow.core.schedule import step
    from fallow.core.sparse import Adapters, SparseDelta
    from fallow.core.statistics import Statistics
    from fallow.core.trainer import Callback
    from fallow.core.trimming import trim
    from fallow.deltas import attach, load
    from fallow.objectives.adding import add_objective
    from fallow.objectives.ba_lora import BALoRA
    from fallow.objectives.distillation import FeatureDistillation
    from fallow.objectives.low_rank import LowRankChange
    from fallow.objectives.orthogonality import Orthogonality
    from fallow.objectives.orthonormal import Orthonormal
    from fallow.objectives.perturbation import WeightPerturbation
    from fallow.objectives.unlearning import GradientAscent, InvertedHinge
    from fallow.optim.allora import ALLoRA
    from fallow.optim.apollo import APOLLO, APOLLOMini
    from fallow.optim.dct_adamw import DCTAdamW
    from fallow.optim.fira import Fira
    from fallow.optim.frugal import FRUGAL
    from fallow.optim.galore import GaLore
    from fallow.optim.ggpo import GGPO
    from fallow.optim.gradnormlorp import GradNormLoRP
    from fallow.optim.lisa import LISA
    from fallow.optim.lora_plus import LoRAPlus
    from fallow.optim.lora_pro import LoRAPro
    from fallow.optim.lowrank import LowRank
    from fallow.optim.q_galore import QGaLore
    from fallow.optim.riemannian import Riemannian
    from fallow.optim.trion import Trion
    from fallow.recipes.adapter_files import save_adapter
    from fallow.recipes.continual_tasks import TaskSequence
    from fallow.recipes.formats.from_peft import from_peft
    from fallow.recipes.formats.plain_lora import to_lora
    from fallow.recipes.formats.to_peft import to_peft
    from fallow.recipes.generalise_domains import DomainBatches
    from fallow.recipes.module_search import search_modules
    from fallow.report.ranks import rank_figure
    from fallow.selection.largest import Largest
    from fallow.selection.lt_sft import LTSFT
    from fallow.selection.peft_config import SaRAConfig, SHiRAConfig
    from fallow.selection.peft_sparse import from_sparse, to_sparse
    from fallow.selection.random import Random
    from fallow.selection.sara import SaRA
    from fallow.selection.selective import Selective
    from fallow.selection.shira import SHiRA
    from fallow.starts.corda import CorDA
    from fallow.starts.eva import EVA
    from fallow.starts.fila import FILA
    from fallow.starts.lora_ga import LoRAGA
    from fallow.starts.lora_sb import LoRASB, first_lr
    from fallow.starts.milora import MiLoRA
    from fallow.starts.olora import OLoRA
    from fallow.starts.pissa import PiSSA

__version__ = "0.1.0"
__all__ = [
    "APOLLO",
    "EVA",
    "FILA",
    "FRUGAL",
    "GGPO",
    "LISA",
    "LTSFT",
    "ALLoRA",
    "APOLLOMini",
    "AdaLoRARanks",
    "AdapterError",
    "Adapters",
    "BALoRA",
    "Callback",
    "Card",
    "CoLoRARanks",
    "ConfigError",
    "CorDA",
    "DCTAdamW",
    "DataError",
    "Delta",
    "DiffoRARanks",
    "DomainBatches",
    "EVARanks",
    "FallowError",
    "FeatureDistillation",
    "Fira",
    "GaLore",
    "GradNormLoRP",
    "GradientAscent",
    "IncreLoRA",
    "InvertedHinge",
    "LaMDARanks",
    "Largest",
    "LoRAGA",
    "LoRAPlus",
    "LoRAPro",
    "LoRASB",
    "LowRank",
    "LowRankChange",
    "MethodOptions",
    "MiLoRA",
    "ModelError",
    "OLoRA",
    "Objective",
    "Orthogonality",
    "Orthonormal",
    "PiSSA",
    "QGaLore",
    "Random",
    "Riemannian",
    "SHiRA",
    "SHiRAConfig",
    "SaRA",
    "SaRAConfig",
    "SelectionError",
    "Selective",
    "SparseDelta",
    "Statistics",
    "TaskSequence",
    "TrainingError",
    "Trion",
    "Uniform",
    "WeightPerturbation",
    "activate",
    "add_objective",
    "attach",
    "check_gradients",
    "condition",
    "config_of",
    "detach",
    "disabled",
    "first_lr",
    "from_peft",
    "from_sparse",
    "hotswap",
    "load",
    "merge",
    "methods",
    "mixed",
    "penalty",
    "probe",
    "probe_bytes",
    "rank_figure",
    "save",
    "save_adapter",
    "search_modules",
    "set_scale",
    "step",
    "to_lora",
    "to_peft",
    "to_sparse",
    "trim",
    "unmerge",
]

_HOME = {
    "ALLoRA": "fallow.optim.allora",
    "APOLLO": "fallow.optim.apollo",
    "APOLLOMini": "fallow.optim.apollo",
    "AdaLoRARanks": "fallow.budgets.adalora",
    "AdapterError": "fallow.core.errors",
    "Adapters": "fallow.core.sparse",
    "BALoRA": "fallow.objectives.ba_lora",
    "Callback": "fallow.core.trainer",
    "Card": "fallow.catalogue",
    "CoLoRARanks": "fallow.budgets.colora",
    "ConfigError": "fallow.core.errors",
    "CorDA": "fallow.starts.corda",
    "DCTAdamW": "fallow.optim.dct_adamw",
    "DataError": "fallow.core.errors",
    "Delta": "fallow.core.delta",
    "DiffoRARanks": "fallow.budgets.diffora",
    "DomainBatches": "fallow.recipes.generalise_domains",
    "EVA": "fallow.starts.eva",
    "EVARanks": "fallow.budgets.eva",
    "FILA": "fallow.starts.fila",
    "FRUGAL": "fallow.optim.frugal",
    "FallowError": "fallow.core.errors",
    "FeatureDistillation": "fallow.objectives.distillation",
    "Fira": "fallow.optim.fira",
    "GGPO": "fallow.optim.ggpo",
    "GaLore": "fallow.optim.galore",
    "GradNormLoRP": "fallow.optim.gradnormlorp",
    "GradientAscent": "fallow.objectives.unlearning",
    "IncreLoRA": "fallow.budgets.increlora",
    "InvertedHinge": "fallow.objectives.unlearning",
    "LISA": "fallow.optim.lisa",
    "LTSFT": "fallow.selection.lt_sft",
    "LaMDARanks": "fallow.budgets.lamda",
    "Largest": "fallow.selection.largest",
    "LoRAGA": "fallow.starts.lora_ga",
    "LoRAPlus": "fallow.optim.lora_plus",
    "LoRAPro": "fallow.optim.lora_pro",
    "LoRASB": "fallow.starts.lora_sb",
    "LowRank": "fallow.optim.lowrank",
    "LowRankChange": "fallow.objectives.low_rank",
    "MethodOptions": "fallow.core.delta",
    "MiLoRA": "fallow.starts.milora",
    "ModelError": "fallow.core.errors",
    "OLoRA": "fallow.starts.olora",
    "Objective": "fallow.core.objective",
    "Orthogonality": "fallow.objectives.orthogonality",
    "Orthonormal": "fallow.objectives.orthonormal",
    "PiSSA": "fallow.starts.pissa",
    "QGaLore": "fallow.optim.q_galore",
    "Random": "fallow.selection.random",
    "Riemannian": "fallow.optim.riemannian",
    "SHiRA": "fallow.selection.shira",
    "SHiRAConfig": "fallow.selection.peft_config",
    "SaRA": "fallow.selection.sara",
    "SaRAConfig": "fallow.selection.peft_config",
    "SelectionError": "fallow.core.errors",
    "Selective": "fallow.selection.selective",
    "SparseDelta": "fallow.core.sparse",
    "Statistics": "fallow.core.statistics",
    "TaskSequence": "fallow.recipes.continual_tasks",
    "TrainingError": "fallow.core.errors",
    "Trion": "fallow.optim.trion",
    "Uniform": "fallow.budgets.uniform",
    "WeightPerturbation": "fallow.objectives.perturbation",
    "activate": "fallow.core.host",
    "add_objective": "fallow.objectives.adding",
    "attach": "fallow.deltas",
    "check_gradients": "fallow.core.gradients",
    "condition": "fallow.core.accompany",
    "config_of": "fallow.core.peft_host",
    "detach": "fallow.core.host",
    "disabled": "fallow.core.host",
    "first_lr": "fallow.starts.lora_sb",
    "from_peft": "fallow.recipes.formats.from_peft",
    "from_sparse": "fallow.selection.peft_sparse",
    "hotswap": "fallow.core.peft_host.hotswap",
    "load": "fallow.deltas",
    "merge": "fallow.core.host",
    "methods": "fallow.catalogue",
    "mixed": "fallow.core.host",
    "penalty": "fallow.core.accompany",
    "probe": "fallow.core.probe",
    "probe_bytes": "fallow.core.probe",
    "rank_figure": "fallow.report.ranks",
    "save": "fallow.core.host",
    "save_adapter": "fallow.recipes.adapter_files",
    "search_modules": "fallow.recipes.module_search",
    "set_scale": "fallow.core.host",
    "step": "fallow.core.schedule",
    "to_lora": "fallow.recipes.formats.plain_lora",
    "to_peft": "fallow.recipes.formats.to_peft",
    "to_sparse": "fallow.selection.peft_sparse",
    "trim": "fallow.core.trimming",
    "unmerge": "fallow.core.host",
}
after_import("peft", "fallow.selection.peft_config")
after_import("peft", "fallow.deltas._peft")


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name.endswith("Config") and name in import_module("fallow.deltas._peft").CONFIGS:
        return import_module("fallow.deltas._peft").CONFIGS[name]
    for card in import_module("fallow.catalogue").methods():
        if card.name == name and card.home.startswith("fallow.deltas."):
            return card.load()
    raise AttributeError(f"module 'fallow' has no attribute {name!r}")


def _configs() -> set[str]:
    """The names of the PEFT configs of all weight parameterizations, `LoRAConfig` and so on."""
    return {
        f"{card.name}Config" for card in import_module("fallow.catalogue").methods() if "fallow.deltas." in card.home
    }


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_configs()})
