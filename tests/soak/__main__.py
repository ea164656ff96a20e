"""``python -m tests.soak [--seconds 1800] [--report FOLDER]``: soaks a server, says what it saw."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tests.soak.report import faults, summary, write
from tests.soak.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0, help="how long it is asked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="folder for soak.md, soak.json and the plot")
    parser.add_argument("--remark", default="", help="what the page says of the machine")
    options = parser.parse_args()
    soak = run(options.seconds, options.seed)
    told = summary(soak)
    print(json.dumps(told, indent=1))
    if options.report is not None:
        write(soak, options.report, options.remark)
    found = faults(soak)
    for fault in found:
        print(fault)
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
