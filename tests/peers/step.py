#!/usr/bin/env python3
"""A training step beside the same step in PyTorch, in turns; see step.sh.

Prints one JSON line for each shape and mode, and one with the geometric means and what misses its
target; exit status 1 when something does. Ratios above 1 say that looptrain is faster, ratios of
memory below 1 that it takes less.
"""

import json
import math
import os
import sys

import turns

SHAPES = {
    "default": {},
    "long": {"batch": 2, "sequence": 1024},
    "vocabulary": {"batch": 2, "vocab": 49152},
    "loops": {"loops": 8},
    "wide": {"hidden": 768, "layers": 6, "heads": 12, "ffn": 2048, "batch": 2},
    "single": {"batch": 1},
}

# At least so many times as fast: the default shape, every shape, and all in the geometric mean.
TARGETS = {
    "eager": {"default": 1.3, "each": 1.0, "mean": 1.3},
    "compile": {"default": 1.2, "each": 1.2, "mean": 1.2},
}
# At most this share of the peer's memory, for the default shape, computing a loop at a time again.
MEMORY_TARGET = 0.35


def ours(arguments, shape, recompute):
    """Figures of one turn, in a process of its own."""
    command = [arguments.looptrain, "bench", "step", *turns.options(shape)]
    command += ["--steps", arguments.steps, "--threads", arguments.threads]
    return turns.last_json([*command, "--recompute", recompute])


def theirs(arguments, shape, mode):
    """Figures of one turn of the peer."""
    return turns.peer(arguments, "bench", shape, "--threads", arguments.threads, "--mode", mode)


def compare(arguments, name, mode, idle):
    """Turns on one shape."""
    shape = turns.DEFAULT | SHAPES[name]
    own, loop, peers = [], [], []
    for number in range(arguments.pairs):
        own.append(ours(arguments, shape, "none"))
        peers.append(theirs(arguments, shape, mode))
        if number == 0:
            loop.append(ours(arguments, shape, "loop"))
        pair = f"{own[-1]['median_seconds']:.3f} s, peer {peers[-1]['step_s']:.3f} s"
        turns.say(f"{name}, {mode}, pair {number + 1} of {arguments.pairs}: {pair}")
    seconds, peer_seconds = turns.median(own, "median_seconds"), turns.median(peers, "step_s")
    peer_peak = turns.median(peers, "peak_bytes")
    share = turns.median(own, "share_of_matrix_rate")
    pairs = [peer["step_s"] / step["median_seconds"] for step, peer in zip(own, peers)]
    return {
        "bench": "step beside torch",
        "shape": name,
        **shape,
        "mode": mode,
        "threads": arguments.threads,
        "pairs": arguments.pairs,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "ratio": round(peer_seconds / seconds, 3),
        "ratios": [round(ratio, 3) for ratio in pairs],
        "share_of_matrix_rate": share,
        "loop_seconds": turns.median(loop, "median_seconds"),
        "loop_ratio": round(peer_seconds / turns.median(loop, "median_seconds"), 3),
        "peak_bytes": turns.median(own, "peak_bytes"),
        "loop_peak_bytes": turns.median(loop, "peak_bytes"),
        "peer_peak_bytes": peer_peak,
        "peer_idle_bytes": idle,
        "memory_ratio": round(turns.median(own, "peak_bytes") / peer_peak, 3),
        "loop_memory_ratio": round(turns.median(loop, "peak_bytes") / peer_peak, 3),
        "loss": turns.median(own, "loss"),
        "peer_loss": turns.median(peers, "loss"),
        "peer": peers[0]["peer"],
        "machine": own[0]["machine"],
    }


def main():
    """Compares, and says what misses its target."""
    parser = turns.parser(__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both")
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="may be repeated; all by default"
    )
    parser.add_argument(
        "--mode", action="append", choices=TARGETS, help="of the peer; may be repeated; eager by default"
    )
    arguments = parser.parse_args()
    turns.check(arguments)
    idle = turns.idle_bytes()
    means, missed = {}, []
    for mode in arguments.mode or ["eager"]:
        targets, ratios = TARGETS[mode], []
        for name in arguments.shape or SHAPES:
            found = compare(arguments, name, mode, idle)
            print(json.dumps(found), flush=True)
            ratios.append(found["ratio"])
            least = targets["default" if name == "default" else "each"]
            if found["ratio"] < least:
                missed.append(f"{name}, {mode}: {found['ratio']} of {least}")
            if name == "default" and found["loop_memory_ratio"] > MEMORY_TARGET:
                missed.append(f"memory, {mode}: {found['loop_memory_ratio']} of {MEMORY_TARGET}")
        means[mode] = round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3)
        if means[mode] < targets["mean"]:
            missed.append(f"geometric mean, {mode}: {means[mode]} of {targets['mean']}")
    print(json.dumps({"bench": "step beside torch", "geometric_mean": means, "missed": missed}))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
