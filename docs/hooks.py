"""Pages that are made, not written: methods from the catalogue, commands from the command line itself.

A page of docs/ that holds `<!-- commands -->` gets the tables of all commands there; methods/ is made whole; the
contributing and changelog pages are the files of the repository's root.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]

from capability_page import capability_page  # noqa: E402
from comparison_tables import filled  # noqa: E402
from method_pages import method_page, title  # noqa: E402

from fallow import catalogue  # noqa: E402


def on_config(config: Any) -> Any:
    """Put the method pages into the navigation."""
    ready = [card for card in catalogue.methods() if card.ready]
    for entry in config["nav"]:
        if isinstance(entry, dict) and "Methods" in entry:
            pages = ["methods/index.md", {"Capabilities": "methods/capabilities.md"}]
            entry["Methods"] = [*pages, *({title(card): f"methods/{card.slug}.md"} for card in ready)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that have no file."""
    pages = {
        "methods/index.md": overview(),
        "methods/capabilities.md": capability_page(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    pages |= {f"methods/{card.slug}.md": method_page(card) for card in catalogue.methods() if card.ready}
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the marks: the tables of the commands, and the picture where it has been made."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", "\n\n".join(commands()))
    markdown = filled(markdown)
    picture = "![the base model, SaRA, real pictures of the style](assets/readme.png)"
    made = (ROOT / "docs/assets/readme.png").exists()
    return markdown.replace("<!-- picture -->", picture if made else "")


# -- methods ----------------------------------------------------------------------------------------------------------


def overview() -> str:
    """All cards, in two tables."""
    lines = ["# Methods", "", "[What each can do](capabilities.md), as it was tried.", "", "## Ready", ""]
    lines += ["| method | idea | what it does |", "| --- | --- | --- |"]
    cards = catalogue.methods()
    lines += [f"| [{title(c)}]({c.slug}.md) | {c.idea} | {c.purpose} |" for c in cards if c.ready]
    lines += ["", "## Planned", "", "Their specifications are written; their code is not.", ""]
    lines += ["| method | idea | what it is for | paper |", "| --- | --- | --- | --- |"]
    lines += [f"| {c.slug} | {c.idea} | {c.purpose} | [{c.title}]({c.link}) |" for c in cards if not c.ready]
    return "\n".join(lines) + "\n"


# -- commands ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """A section for each command, read from the commands themselves."""
    import typer

    from fallow.cli import GENERATED, app

    group = typer.main.get_command(app)
    for name in ("train", "generate", "evaluate", "compare", "continual", "generalise", "probe", "doctor", "methods"):
        yield section(name, GENERATED[name]() if name in GENERATED else group.commands[name])
    for name, command in group.commands["adapter"].commands.items():
        yield section(f"adapter {name}", command)


def section(name: str, command: Any) -> str:
    lines = [f"## fallow {name}", "", plain(command.help or ""), ""]
    examples = re.findall(r"\[bold\](.*?)\[/\]", command.epilog or "")
    lines += ["```bash", *examples, "```", ""] if examples else []
    rows = [row(parameter) for parameter in command.params if not getattr(parameter, "hidden", False)]
    return "\n".join([*lines, "| argument | | |", "| --- | --- | --- |", *rows])


def row(parameter: Any) -> str:
    argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if argument else [*parameter.opts, *parameter.secondary_opts]
    kind = "" if argument or parameter.is_flag else (parameter.metavar or "")
    default = parameter.default
    said = plain(parameter.help or "").replace("\\[", "[")
    if isinstance(default, str | int | float | Path) and not isinstance(default, bool) and "default:" not in said:
        said += f" (default: {default})"
    cells = (", ".join(f"`{name}`" for name in names), f"`{kind}`" if kind else "", said)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def plain(text: str) -> str:
    """Without the marks of rich."""
    return re.sub(r"\[/?(bold)?\]", "", text).replace("<", "&lt;").strip()
