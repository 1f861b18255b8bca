"""Find out what every method can do, by doing it, and write it down for `fallow methods` and the documentation.

    python scripts/probe_capabilities.py                          # writes src/fallow/catalogue/capabilities.json
    python scripts/probe_capabilities.py --check                  # only compares; exit code 1 where something differs
    python scripts/probe_capabilities.py --methods bone --columns merge compile

The probes are those of tests/contract, on models of one layer; `train` runs the command on mini-sd. What a method
cannot do is written down with the error that a user gets. A probe that fails in another way than by one of our errors
is a bug: it ends the script and leaves the file as it was. All of it takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "contract"), str(ROOT / "tests")]
FILE = ROOT / "src/fallow/catalogue/capabilities.json"


def main() -> int:
    from capability_table import differences, subjects, try_out

    from fallow.catalogue.capability import COLUMNS
    from fallow.core.files import atomic_write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(subjects()), default=list(subjects()))
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--check", action="store_true", help="compare with the file, and write nothing")
    told = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    stored = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    tried = {}
    for number, slug in enumerate(told.methods, 1):
        print(f"{number}/{len(told.methods)} {slug}", file=sys.stderr, flush=True)
        tried[slug] = try_out(slug, told.columns)
    changed = differences(stored, tried)
    print("\n".join(changed) or "nothing differs from the file")
    if told.check:
        return 1 if changed else 0
    table = {slug: {**stored.get(slug, {}), **tried.get(slug, {})} for slug in subjects()}
    with atomic_write(FILE) as partial:
        text = json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
