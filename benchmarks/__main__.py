"""`python -m benchmarks report` measures what this machine can; see tools/report.py."""

import sys

from benchmarks.tools import report

if __name__ == "__main__":
    if sys.argv[1:2] != ["report"]:
        raise SystemExit("usage: python -m benchmarks report [--help]")
    report.main(sys.argv[2:])
