#!/usr/bin/env python3
"""Writes the Grafana dashboards that lie beside it: run, workers, storage, looplm.

    pip install grafana-foundation-sdk==0.0.21
    python3 ops/grafana/build.py            # writes the four files
    python3 ops/grafana/build.py --check    # exit status 1 when one is not what this would write

Each dashboard is a module of its name, built from queries.py, panels.py and pages.py.
"""

import argparse
import json
import pathlib
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder

import looplm
import run
import storage
import workers

HERE = pathlib.Path(__file__).parent
BOARDS = (run, workers, storage, looplm)


def main():
    arguments = argparse.ArgumentParser(description="Writes the Grafana dashboards.")
    arguments.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file differs")
    check = arguments.parse_args().check
    stale = []
    for module in BOARDS:
        text = json.dumps(module.board(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        path = HERE / f"{module.__name__}.json"
        if check:
            if not path.is_file() or path.read_text() != text:
                stale.append(path.name)
        else:
            path.write_text(text)
    if stale:
        sys.exit(f"not what build.py writes: {', '.join(stale)}; run python3 ops/grafana/build.py")


if __name__ == "__main__":
    main()
