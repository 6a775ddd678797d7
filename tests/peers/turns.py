"""What the comparisons with PyTorch share: the programs to compare, and how they take turns.

No program of its own: step.sh and ddp.sh are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The options of `looptrain bench step`, and the peer's names for them.
PEER_NAMES = {"hidden": "d", "sequence": "seq"}
DEFAULT = {
    "hidden": 256,
    "layers": 4,
    "loops": 4,
    "heads": 4,
    "ffn": 768,
    "vocab": 4096,
    "batch": 8,
    "sequence": 256,
}


def parser(description):
    """Arguments that all comparisons have."""
    arguments = argparse.ArgumentParser(description=description)
    target = os.environ.get("CARGO_TARGET_DIR") or ROOT / "target"
    program = Path(target) / "release" / "looptrain"
    arguments.add_argument("--looptrain", type=Path, default=program, help="the release build")
    reference = ROOT / ".." / "shared" / "reference" / "looplm_torch.py"
    arguments.add_argument(
        "--reference", type=Path, default=reference, help="the LoopLM in PyTorch that is the peer"
    )
    arguments.add_argument("--pairs", type=int, default=5, help="turns of each; medians count")
    arguments.add_argument("--steps", type=int, default=7, help="steps measured in each turn")
    return arguments


def check(arguments):
    """Ends the program, with what to do, unless all that takes part is there."""
    if not os.access(arguments.looptrain, os.X_OK):
        sys.exit(
            f"there is no program {arguments.looptrain}; build it with `cargo build --release`, or "
            "say where it is with --looptrain"
        )
    if not arguments.reference.is_file():
        sys.exit(
            f"there is no {arguments.reference}, the LoopLM in PyTorch to compare with, which is not "
            "part of this repository; say where it is with --reference"
        )
    found = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True, text=True)
    if found.returncode != 0:
        sys.exit(
            f"{sys.executable} cannot load torch: install it with `{sys.executable} -m pip install "
            "torch`, or name another Python with PYTHON=...\n" + found.stderr.strip()[-300:]
        )


def last_json(command):
    """Runs a command, and reads the last line that it prints."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        command = " ".join(str(part) for part in command)
        sys.exit(f"{command} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def options(shape, names=None):
    """A shape as command line options."""
    names = names or {}
    return [part for key, size in shape.items() for part in (f"--{names.get(key, key)}", size)]


def peer(arguments, command, shape, *rest):
    """Figures of one turn of the peer, in a process of its own."""
    given = [command, *options(shape, PEER_NAMES), "--steps", arguments.steps, *rest]
    return last_json([sys.executable, arguments.reference, *given])


def idle_bytes():
    """The peer's memory when it has loaded its library, and done nothing yet."""
    script = "import resource, torch; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    return last_json([sys.executable, "-c", script]) * 1024


def median(turns, key):
    """The median over the turns."""
    return statistics.median(turn[key] for turn in turns)


def say(text):
    """Progress, beside the results on stdout."""
    print(text, file=sys.stderr, flush=True)
