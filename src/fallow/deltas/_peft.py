"""Tells PEFT of all weight parameterizations; imported as soon as PEFT is."""

import fallow.deltas  # noqa: F401  # which makes them known
from fallow.core.peft_host import configs

CONFIGS = configs()
