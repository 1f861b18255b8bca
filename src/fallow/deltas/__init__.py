"""The weight parameterizations, one file each. Importing this package makes all of them known by name.

`attach` and `load` are those of `fallow.core.host`; by way of this package they know every name, those of starts,
budgets and objectives too.
"""

from importlib import import_module
from pkgutil import iter_modules

import fallow.budgets
import fallow.objectives
import fallow.starts  # noqa: F401  # which makes their names known
from fallow.core.host import attach, load

__all__ = ["attach", "load"]

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):  # what needs PEFT
        import_module(f"{__name__}.{_module.name}")
