"""One PEFT tuner that hosts every method of this package: `get_peft_model(model, fallow.SaRAConfig(...))`.

PEFT sees one type, `FALLOW`, whose config names the method; so adapters of different methods may live in one model.
The type and the prefix `fallow_` stand in every adapter file: `<module>.fallow_delta.<tensor>` beside an
`adapter_config.json` with `"peft_type": "FALLOW", "method": ...`.

    FallowConfig   the fields that all methods share; a method derives its own and makes the Deltas of an adapter
    Delta          what one adapter is in one layer: flat tensors, Parameters trained, buffers saved with them
    Kind           how the Deltas of one sort act together in one layer (which weight it runs with, merging)
    FallowLayer    stands in the place of an adapted module and lets the Kinds of its active Deltas act
    FallowModel    the tuner: wraps the targets, then asks the config once for the Deltas of all of them

Nothing here knows a method. PEFT gives saving, loading, switching, disabling, merging, `modules_to_save`, the Trainer
and the hub. A weight that several modules share is adapted once, in all of them. Names that PEFT does not document are
used in this folder only.
"""

from fallow.core.peft_host.contract import Active, Delta, FallowConfig, Kind, Site, host
from fallow.core.peft_host.layer import PREFIX, FallowLayer
from fallow.core.peft_host.tuner import FallowModel

__all__ = ["PREFIX", "Active", "Delta", "FallowConfig", "FallowLayer", "FallowModel", "Kind", "Site", "host"]
