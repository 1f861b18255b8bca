"""A card: what there is to say about one method."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from fallow.core.errors import ConfigError, nearest

Idea = Literal[
    "selection",  # some entries of the existing weights are trained in place
    "delta",  # a frozen weight is changed by a few trained tensors
    "start and budget",  # how a low-rank delta starts, and which layer gets how much rank
    "update rule",  # what happens between a gradient and a weight
    "objective",  # a term added to the loss
    "full",  # every weight is trained
    "compose", "compress", "transfer", "federated", "serving", "analysis", "recipe",
]  # fmt: skip
Status = Literal["ready", "planned"]


@dataclass(frozen=True)
class Card:
    """What there is to say about one method.

    `slug`: its name on the command line and in files. `title`, `arxiv`: of its paper. `idea`: which of the house's
    ideas it is an instance of. `purpose`: one line. `name`: the public class in `fallow`, "" where the method has none
    of its own. `home`: the module with that class. `defaults`: what it does when nothing is said. `claim`: what its
    paper claims, or what a baseline is there to show. `tested`: the test that checks the claim. `apart`: why `fallow
    train` does not train with a ready method, "" where it does. For the method's page, in Markdown: `equation`, with
    shapes; `when` to use it; `cost`, the formula of its trained numbers and what a layer costs; `found`, what we
    measured, agreeing with the paper or not; and `use`, lines of Python, for methods whose idea does not tell them.

    ConfigError for an idea or a status that does not exist, and for a ready method that lacks its claim or its test.
    """

    slug: str
    title: str
    arxiv: str
    idea: Idea
    purpose: str
    status: Status = "planned"
    name: str = ""
    home: str = ""
    defaults: str = ""
    claim: str = ""
    tested: str = ""
    apart: str = ""
    use: str = ""
    equation: str = ""
    when: str = ""
    cost: str = ""
    found: str = ""

    def __post_init__(self) -> None:
        for field, allowed in (("idea", get_args(Idea)), ("status", get_args(Status))):
            if getattr(self, field) not in allowed:
                said = getattr(self, field)
                raise ConfigError(f"card '{self.slug}': {field}={said!r} does not exist{nearest(said, allowed)}")
        if self.status == "ready" and not (self.claim and self.tested):
            raise ConfigError(f"card '{self.slug}' is ready but lacks claim= or tested=; say what holds, and where")

    @property
    def ready(self) -> bool:
        return self.status == "ready"

    @property
    def link(self) -> str:
        """The address of the paper, "" where there is none."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def load(self) -> Any:
        """Import the method's class. ConfigError where it has none of its own, or is only planned."""
        if not self.home:
            why = "goes through the command line only" if self.ready else "is planned, not written yet"
            raise ConfigError(f"'{self.slug}' has no class to load: it {why}")
        return getattr(import_module(self.home), self.name)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
