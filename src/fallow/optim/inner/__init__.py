"""Rules that turn a (projected) gradient into a direction."""

from fallow.optim.inner.adamw import AdamW
from fallow.optim.inner.rule import Inner

INNER: dict[str, type[Inner]] = {kind.name: kind for kind in (AdamW,)}
