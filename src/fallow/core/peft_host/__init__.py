"""One PEFT tuner that hosts every method of this package: `get_peft_model(model, fallow.SaRAConfig(...))`.

PEFT sees one type, `FALLOW`, whose config names the method; so adapters of different methods may live in one model.
The type and the prefix `fallow_` stand in every adapter file: `<module>.fallow_delta.<tensor>` beside an
`adapter_config.json` with `"peft_type": "FALLOW", "method": ...`.

    FallowConfig   the fields that all methods share; a method derives its own and makes what acts in each layer
    DeltaConfig    those of weight parameterizations; `config_of(Method)` makes a method's own from its options
    Hosted, Kind   what is in a layer and is no Delta (chosen entries), and how such things act together there
    Acting         the Kind of all Deltas: they act by `fallow.core.engine`
    FallowLayer    stands in the place of an adapted module and lets the Kinds of what is active act
    Shared         what all layers of an adapter share, at the root of the model
    FallowModel    the tuner: wraps the targets, then asks the config once for what acts in all of them

Nothing here knows a method, but that sums of adapters are written as LoRA. PEFT gives saving, loading, switching,
disabling, merging, `modules_to_save`, the Trainer and the hub. A weight that several modules share is adapted once, in
all of them. Names that PEFT does not document are used in this folder only.
"""

from fallow.core.on_import import held_back

with held_back():  # these import PEFT, and what waits for PEFT imports these
    from fallow.core.peft_host.contract import Active, FallowConfig, Hosted, Kind, Site, host
    from fallow.core.peft_host.deltas import DeltaConfig, config_of, configs
    from fallow.core.peft_host.layer import PREFIX, FallowLayer
    from fallow.core.peft_host.tuner import FallowModel

__all__ = [
    "PREFIX",
    "Active",
    "DeltaConfig",
    "FallowConfig",
    "FallowLayer",
    "FallowModel",
    "Hosted",
    "Kind",
    "Site",
    "config_of",
    "configs",
    "host",
]
