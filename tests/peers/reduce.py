#!/usr/bin/env python3
"""The all-reduce beside gloo's, of the same bytes over the same loopback, in turns.

    tests/peers/reduce.py --looptrain target/release/looptrain --workers 2

gloo is what PyTorch trains with on CPUs: torch.distributed.all_reduce of one f32 tensor, one process
a rank, each with one thread for arithmetic beside the one that gloo has for its sockets. They stay,
and sleep while the other side is measured. looptrain is measured by `looptrain bench reduce`, whose
ranks are tasks of one process, with a thread a core. Both sums are checked. A turn is `--rounds`
all-reduces of each, after one that is not counted, and gives the median of them; the ratio is of a
pair of turns, and its median over all pairs is compared with the target. Prints one JSON line; exit
status 1 below a target.

It takes PyTorch: pip install torch (on Debian also: apt-get install python3-torch).
"""

import os
import sys

# Not the folder of this script, where a tokenize.py lies that is not Python's own.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [path for path in sys.path if os.path.abspath(path) != HERE]

import argparse
import json
import multiprocessing
import queue
import socket
import statistics
import subprocess
import time

# What gloo takes, in times of the fast sum; what the exact sum takes, in times of the fast one.
TARGET = 1.0
EXACT_TARGET = 2.2


def rank(number, world, port, elements, rounds, turns, times):
    """One rank: a turn for each True that comes, until False does."""
    import torch
    import torch.distributed as dist

    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=world)
    tensor = torch.empty(elements)
    while turns.get():
        for _ in range(rounds + 1):
            tensor.fill_(number + 1)
            dist.barrier()
            start = time.monotonic()
            dist.all_reduce(tensor)
            times.put((start, time.monotonic()))
        expected = world * (world + 1) // 2
        if not bool((tensor == expected).all()):
            raise SystemExit(f"rank {number}: the sum is not {expected} everywhere")
        dist.barrier()
    dist.destroy_process_group()


class Gloo:
    """All ranks of the peer, asleep between turns."""

    def __init__(self, world, elements, rounds):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.rounds = rounds
        self.turns = [context.Queue() for _ in range(world)]
        self.times = [context.Queue() for _ in range(world)]
        self.ranks = []
        for number, (turns, times) in enumerate(zip(self.turns, self.times)):
            given = (number, world, port, elements, rounds, turns, times)
            self.ranks.append(context.Process(target=rank, args=given, daemon=True))
            self.ranks[-1].start()

    def receive(self, times):
        while True:
            try:
                return times.get(timeout=1)
            except queue.Empty:
                if not all(process.is_alive() for process in self.ranks):
                    sys.exit("a rank of the peer has ended; its message is above")

    def turn(self):
        """Median seconds of an all-reduce, from when the first rank begins to when the last ends."""
        for turns in self.turns:
            turns.put(True)
        seconds = []
        for _ in range(self.rounds + 1):
            starts, ends = zip(*(self.receive(times) for times in self.times))
            seconds.append(max(ends) - min(starts))
        return statistics.median(seconds[1:])

    def end(self):
        for turns in self.turns:
            turns.put(False)
        for process in self.ranks:
            process.join()


def looptrain(arguments):
    """Figures of one turn."""
    command = [arguments.looptrain, "bench", "reduce", "--workers", str(arguments.workers)]
    command += ["--bytes", str(arguments.bytes), "--rounds", str(arguments.rounds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--looptrain", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bytes", type=int, default=256 << 20, help="of the gradient in f32")
    parser.add_argument("--rounds", type=int, default=3, help="all-reduces of a turn")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("there is no PyTorch here; pip install torch, or use a Python that has it")
    peer = Gloo(arguments.workers, arguments.bytes // 4, arguments.rounds)
    # The first turn of the peer connects its ranks, and is not counted.
    peer.turn()
    ours, theirs = [], []
    for number in range(arguments.pairs):
        ours.append(looptrain(arguments))
        theirs.append(peer.turn() * 1e3)
        fast, exact = (ours[-1][kind]["reduce_ms"] for kind in ["fast", "exact"])
        print(
            f"pair {number + 1} of {arguments.pairs}: fast {fast:.0f} ms, exact {exact:.0f} ms, "
            f"gloo {theirs[-1]:.0f} ms, load {os.getloadavg()[0]:.1f}",
            file=sys.stderr,
        )
    peer.end()
    fast = [figures["fast"]["reduce_ms"] for figures in ours]
    exact = [figures["exact"]["reduce_ms"] for figures in ours]
    ratios = sorted(peer / own for peer, own in zip(theirs, fast))
    ratio = statistics.median(ratios)
    exact_over_fast = statistics.median(figures["exact_over_fast"] for figures in ours)
    print(
        json.dumps(
            {
                "bench": "reduce beside gloo",
                "workers": arguments.workers,
                "bytes": ours[0]["bytes"],
                "pairs": arguments.pairs,
                "rounds": arguments.rounds,
                "fast_ms": round(statistics.median(fast), 3),
                "exact_ms": round(statistics.median(exact), 3),
                "gloo_ms": round(statistics.median(theirs), 3),
                "gloo_over_fast": round(ratio, 3),
                "gloo_over_fast_range": [round(ratios[0], 3), round(ratios[-1], 3)],
                "exact_over_fast": round(exact_over_fast, 3),
                "torch": torch.__version__,
                "machine": ours[0]["machine"],
            }
        )
    )
    sys.exit(0 if ratio >= TARGET and exact_over_fast <= EXACT_TARGET else 1)


if __name__ == "__main__":
    main()
