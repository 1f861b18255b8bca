"""What a caption says each time its picture is used: tags shuffled or left out, one of several wordings drawn.

    caption    one text, or with wildcards several lines of which one is drawn; "a {red|blue} bag" draws a word
    tags       "1girl, red hair, smile": the parts between commas. The first `keep` stay in place and are never dropped
    trigger    a phrase that stands in front of every caption which does not hold it already; never dropped
    prefix     stands before all of that, suffix behind it

Names and meaning are those of kohya's sd-scripts, except that prefix and suffix are put on after shuffling, so that
they stay where they are. All chance comes from one `chances.Random`, which the caller seeds.
"""

from __future__ import annotations

import random as chances
import re
from collections.abc import Callable
from dataclasses import dataclass

SEPARATOR = ","
GROUP = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # {{ and }} stand for the braces themselves


@dataclass(frozen=True)
class CaptionRules:
    """What is done with every caption; the defaults leave it as it is."""

    shuffle: bool = False
    keep: int = 0
    tag_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    trigger: str = ""
    wildcards: bool = False

    @property
    def random(self) -> bool:
        """Whether captions differ from use to use."""
        return self.shuffle or self.tag_dropout > 0 or self.wildcards

    def drawn(self, caption: str, chance: chances.Random) -> str:
        """The caption for one use of its picture."""
        text = self._worded(caption, chance.choice)
        if self.shuffle or self.tag_dropout > 0:
            tags = tags_of(text)
            fixed, loose = tags[: self.keep], tags[self.keep :]
            if self.shuffle:
                chance.shuffle(loose)
            loose = [tag for tag in loose if chance.random() >= self.tag_dropout]
            text = f"{SEPARATOR} ".join(fixed + loose)
        return self._framed(text)

    def plain(self, caption: str) -> str:
        """The caption without chance: its first wording, all tags in their order. For drawings and validation."""
        return self._framed(self._worded(caption, lambda choices: choices[0]))

    def _worded(self, caption: str, choose: Callable[[list[str]], str]) -> str:
        if not self.wildcards:
            return caption
        line = choose([line.strip() for line in caption.splitlines() if line.strip()] or [""])
        braces = {"{{": "{", "}}": "}"}
        return GROUP.sub(lambda found: braces.get(found[0]) or choose(found[1].split("|")), line)

    def _framed(self, text: str) -> str:
        if self.trigger and self.trigger not in text:
            text = f"{self.trigger}{SEPARATOR} {text}" if text else self.trigger
        return " ".join(part for part in (self.prefix, text, self.suffix) if part)


def tags_of(caption: str) -> list[str]:
    """The parts between the commas, in order, without empty ones."""
    return [tag.strip() for tag in caption.split(SEPARATOR) if tag.strip()]
