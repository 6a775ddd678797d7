#!/usr/bin/env python3
"""Two workers beside data parallel training in PyTorch, in turns; see ddp.sh.

Prints one JSON line; exit status 1 below the target.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import turns

TARGET = 1.3

# Steps that neither side counts.
WARM_UP = 2

SPEC = """
[run]
name = "ddp"
store = "file://{store}"
seed = 7

[cluster]
workers = {workers}
worker_timeout = 60.0

[model]
hidden_size = {hidden}
num_hidden_layers = {layers}
num_attention_heads = {heads}
intermediate_size = {ffn}
vocab_size = {vocab}

[[datasets]]
name = "words"

[datasets.source]
paths = ["{text}"]
extensions = ["txt"]
tokenizer_vocabulary = {vocab}

[[stages]]
name = "ddp"
steps = {steps}
sequence_length = {sequence}
slots = {workers}
slot_sequences = {slot_sequences}
loops = {loops}
entropy_weight = 0.05
learning_rate = {{ peak = 3e-4 }}

[checkpoint]
every_steps = 1000000

[evaluation]
sequences = 1

[sample]
tokens = 0
"""


def make_text(directory):
    """Text of made-up words, enough for a tokenizer and some data."""
    dice = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(dice.choices(letters, k=dice.randint(2, 9))) for _ in range(20_000)]
    directory.mkdir()
    for number in range(40):
        text = " ".join(dice.choices(words, k=8_000))
        (directory / f"{number}.txt").write_text(text)


def write_spec(arguments, scratch):
    """The spec of the local run."""
    shape = turns.DEFAULT
    make_text(scratch / "text")
    spec = SPEC.format(
        **shape,
        store=scratch / "store",
        text=scratch / "text",
        workers=arguments.workers,
        steps=arguments.steps + WARM_UP,
        slot_sequences=shape["batch"] // arguments.workers,
    )
    (scratch / "spec.toml").write_text(spec)


def ours(arguments, scratch):
    """Seconds of the steps of a whole local run."""
    command = [arguments.looptrain, "train", scratch / "spec.toml", "--fresh"]
    command += ["--workers", arguments.workers, "--threads", arguments.workers]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"looptrain train failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    logs = sorted((scratch / "store" / "runs" / "ddp" / "metrics").rglob("*.jsonl"))
    steps = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    if len(steps) != arguments.steps + WARM_UP:
        sys.exit(f"the run has logged {len(steps)} steps")
    wrong = [step["step"] for step in steps if step["world"] != arguments.workers]
    if wrong:
        sys.exit(f"not all workers took part in the steps {wrong}")
    return steps[WARM_UP:]


def theirs(arguments):
    """Figures of one turn of the peer."""
    processes = ["--procs", arguments.workers, "--threads", 1]
    return turns.peer(arguments, "ddp", turns.DEFAULT, *processes)


def main():
    """Compares."""
    parser = turns.parser(__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "--workers", type=int, default=2, choices=[2, 4, 8], help="processes, of one thread each"
    )
    arguments = parser.parse_args()
    turns.check(arguments)
    own, sections, peers = [], {}, []
    with tempfile.TemporaryDirectory(prefix="peer-ddp-") as scratch:
        scratch = Path(scratch)
        write_spec(arguments, scratch)
        for number in range(arguments.pairs):
            steps = ours(arguments, scratch)
            own.append({"seconds": statistics.median(step["seconds"] for step in steps)})
            for step in steps:
                for name, seconds in (step.get("sections") or {}).items():
                    sections.setdefault(name, []).append(seconds)
            peers.append(theirs(arguments))
            pair = f"{own[-1]['seconds']:.3f} s, peer {peers[-1]['step_s']:.3f} s"
            turns.say(f"pair {number + 1} of {arguments.pairs}: {pair}")
    seconds, peer_seconds = turns.median(own, "seconds"), turns.median(peers, "step_s")
    pairs = [peer["step_s"] / step["seconds"] for step, peer in zip(own, peers)]
    found = {
        "bench": "two workers beside torch",
        **turns.DEFAULT,
        "workers": arguments.workers,
        "pairs": arguments.pairs,
        "seconds": round(seconds, 4),
        "sections": {name: round(statistics.median(all), 4) for name, all in sections.items()},
        "peer_seconds": peer_seconds,
        "ratio": round(peer_seconds / seconds, 3),
        "ratios": [round(ratio, 3) for ratio in pairs],
        "target": TARGET,
        "peer": peers[0]["peer"],
    }
    print(json.dumps(found))
    sys.exit(0 if found["ratio"] >= TARGET else 1)


if __name__ == "__main__":
    main()
