"""Rules that turn a (projected) gradient into a direction."""

from fallow.optim.inner.adafactor import Adafactor
from fallow.optim.inner.adamw import AdamW, AdamW8bit
from fallow.optim.inner.polar import Polar
from fallow.optim.inner.rule import Inner
from fallow.optim.inner.signs import SGDM, Lion

INNER: dict[str, type[Inner]] = {kind.name: kind for kind in (AdamW, AdamW8bit, Adafactor, Lion, SGDM, Polar)}
