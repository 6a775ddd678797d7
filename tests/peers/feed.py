#!/usr/bin/env python3
"""The feed beside mosaicml-streaming, on the same tokens from the local disk, in turns.

    tests/peers/feed.py --looptrain target/release/looptrain --million-tokens 64

Both give every sequence of one data epoch once, from a process that has read nothing before: the
same tokens, the same sequence length, one process each, no worker processes beside it. looptrain
reads in the order of training, which is shuffled, and checks the hash of every block; the peer is
measured shuffled and, which is faster for it, in the order of its file, and compared by the faster.
Neither is timed while it makes its dataset. Prints one JSON line; exit status 1 below the target.

It takes numpy, pyarrow and mosaicml-streaming, which imports torch though nothing here uses it. On
Debian the small way is: apt-get install python3-venv python3-torch python3-torchvision, a venv with
--system-site-packages, and in it

    pip install --no-deps mosaicml-streaming==0.13.0
    pip install 'numpy<2' 'pyarrow<19' 'transformers<5' xxhash Brotli zstd python-snappy boto3 catalogue \\
        pillow google-cloud-storage azure-storage-blob azure-identity azure-storage-file-datalake \\
        paramiko
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = 5.0


def looptrain(arguments, store):
    """Figures of one epoch of the feed; makes the dataset when it is not there."""
    command = [arguments.looptrain, "bench", "data", "--store", f"file://{store}"]
    command += ["--million-tokens", str(arguments.million_tokens)]
    command += ["--sequence-length", str(arguments.sequence_length), "--rounds", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def make_peer(arguments, store, directory):
    """The same sequences as samples of an MDS dataset."""
    import numpy
    import pyarrow.ipc
    from streaming import MDSWriter

    dataset = store / "datasets" / f"bench-{arguments.million_tokens}"
    manifest = json.loads((dataset / "manifest.json").read_text())
    columns = []
    for shard in manifest["train"]["shards"]:
        with pyarrow.ipc.open_file(str(dataset / shard["file"])) as file:
            columns.append(file.read_all()["token"].to_numpy())
    tokens = numpy.concatenate(columns)
    length = arguments.sequence_length
    with MDSWriter(out=str(directory), columns={"tokens": "ndarray:uint16"}) as writer:
        for first in range(0, len(tokens) - length, length):
            writer.write({"tokens": tokens[first : first + length + 1]})


EPOCH = """
import json, sys, time
directory, shuffle, check = sys.argv[1], sys.argv[2] == "shuffled", sys.argv[3] == "check"
from streaming import StreamingDataset
start = time.perf_counter()
dataset = StreamingDataset(local=directory, shuffle=shuffle, shuffle_seed=7, batch_size=64,
                           num_canonical_nodes=1)
samples = total = 0
for sample in dataset:
    samples += 1
    if check:
        total += int(sample["tokens"].sum(dtype="uint64"))
seconds = time.perf_counter() - start
print(json.dumps({"samples": samples, "seconds": seconds, "sum_of_tokens": total}))
"""


def peer(directory, order, check="time"):
    """Figures of one epoch of the peer, in a process of its own as the other has one."""
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(directory), order, check],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--looptrain", default="target/release/looptrain")
    parser.add_argument("--million-tokens", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="looptrain-peer-") as scratch:
        store, directory = Path(scratch) / "store", Path(scratch) / "mds"
        ours = looptrain(arguments, store)
        make_peer(arguments, store, directory)
        theirs = peer(directory, "in order", "check")
        # Ours is a whole number of steps: what is left over at the end is less than one.
        left = theirs["samples"] - ours["samples"]
        assert 0 <= left < 64, (ours, theirs)
        if left == 0:
            assert theirs["sum_of_tokens"] == ours["sum_of_tokens"], (ours, theirs)
        speeds = {"looptrain": [], "streaming shuffled": [], "streaming in order": []}
        for turn in range(1, arguments.rounds + 1):
            for name in speeds:
                if name == "looptrain":
                    figures = looptrain(arguments, store)
                else:
                    figures = peer(directory, name.removeprefix("streaming "))
                speeds[name].append(figures["samples"] / figures["seconds"])
                print(f"round {turn}: {name}: {speeds[name][-1]:,.0f} samples/s", file=sys.stderr)
            time.sleep(0.2)
    medians = {name: statistics.median(all) for name, all in speeds.items()}
    faster = max(medians["streaming shuffled"], medians["streaming in order"])
    ratio = medians["looptrain"] / faster
    import streaming

    print(
        json.dumps(
            {
                "peer": f"mosaicml-streaming {streaming.__version__}",
                "samples": ours["samples"],
                "sequence_length": arguments.sequence_length,
                "samples_per_second": {name: round(value) for name, value in medians.items()},
                "rounds": {name: [round(value) for value in all] for name, all in speeds.items()},
                "ratio": round(ratio, 2),
                "target": TARGET,
            }
        )
    )
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
