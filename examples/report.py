"""A run of train.py as one page to look at: RUN/report.html, also while it still trains.

python -m examples.report results/L
"""

import argparse
import sys
from pathlib import Path

from utils import script
from utils.training.report_page import write_report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = script.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="the --results-dir of a run")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    print(write_report(args.run))
    return script.DONE


def main(argv: list[str] | None = None) -> int:
    return script.run(
        "examples.report", parse_args, run, argv,
        when_stopped="nothing was written", out_of_memory="Take a machine with more memory.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
