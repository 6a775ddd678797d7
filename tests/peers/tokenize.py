#!/usr/bin/env python3
"""Tokenizing beside Hugging Face `tokenizers`, on the same text with the same tokenizer, in turns.

    tests/peers/tokenize.py --looptrain target/release/looptrain --tokenizer tokenizer.json --mib 256

Both read JSON Lines, tokenize every document with all cores, put an end of text after each, and write
the tokens in 16 bits to the local disk, each in a process of its own, from its start. looptrain also
hashes what it writes, marks where documents begin, holds out a validation split and syncs its files.
The peer is measured with `encode_batch` and, which is faster, `encode_batch_fast`, and compared by the
faster. The text is made from the sources and Markdown in the local cargo registry, or taken from
`--input`. Both must find the same number of tokens. Prints one JSON line; exit status 1 below the
target.

It takes numpy and tokenizers from PyPI.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = 1.0


def make_text(mib, path):
    """Documents of the cargo registry as JSON Lines; again from the beginning when it is too small."""
    home = Path.home() / ".cargo" / "registry" / "src"
    files = sorted(file for kind in ("*.rs", "*.md") for file in home.rglob(kind))
    total = 0
    with path.open("w") as lines:
        while total < mib << 20:
            before = total
            for file in files:
                try:
                    text = file.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue
                if text and len(text) < 1 << 20:
                    total += lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                if total >= mib << 20:
                    return
            if total == before:
                sys.exit(f"there is no text in {home}; give --input")


def looptrain(arguments, text, directory):
    """Figures of one round, in a process of its own."""
    command = [arguments.looptrain, "bench", "tokenize", "--input", str(text), "--rounds", "1"]
    command += ["--tokenizer", arguments.tokenizer, "--store", f"file://{directory}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


ROUND = """
import json, resource, sys, time
import numpy
from tokenizers import Tokenizer
text, tokenizer, output, method = sys.argv[1:]
start = time.perf_counter()
tokenizer = Tokenizer.from_file(tokenizer)
tokenizer.encode_special_tokens = True
end = numpy.array([0], dtype="uint16")
encode = getattr(tokenizer, method)
tokens = size = 0

def write(batch, file):
    written = 0
    for encoding in encode(batch, add_special_tokens=False):
        written += file.write(numpy.array(encoding.ids, dtype="uint16")) // 2
        written += file.write(end) // 2
    return written

with open(text, encoding="utf-8") as lines, open(output, "wb", buffering=1 << 20) as file:
    batch, length = [], 0
    for line in lines:
        batch.append(json.loads(line)["text"])
        length += len(batch[-1])
        size += len(batch[-1].encode())
        if length > 4 << 20:
            tokens += write(batch, file)
            batch, length = [], 0
    tokens += write(batch, file)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"tokens": tokens, "text_bytes": size, "seconds": seconds, "peak_bytes": peak}))
"""


def peer(arguments, text, directory, method):
    """Figures of one round of the peer, in a process of its own."""
    command = [sys.executable, "-c", ROUND, str(text), arguments.tokenizer]
    command += [str(directory / "peer.bin"), method]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--looptrain", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--input", help="JSON Lines with a field `text`")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    methods = ["encode_batch", "encode_batch_fast"]
    with tempfile.TemporaryDirectory(prefix="peer-tokenize-") as scratch:
        scratch = Path(scratch)
        text = Path(arguments.input or scratch / "text.jsonl")
        if not arguments.input:
            make_text(arguments.mib, text)
        ours, theirs = [], {method: [] for method in methods}
        for number in range(arguments.rounds):
            ours.append(looptrain(arguments, text, scratch))
            for method in methods:
                theirs[method].append(peer(arguments, text, scratch, method))
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    counts = {figures["tokens"] for figures in ours + sum(theirs.values(), [])}
    if len(counts) != 1:
        sys.exit(f"they do not find the same number of tokens: {counts}")

    def speed(rounds):
        return statistics.median(f["text_bytes"] / f["seconds"] / 1e6 for f in rounds)

    peers = {method: speed(rounds) for method, rounds in theirs.items()}
    ratio = speed(ours) / max(peers.values())
    print(
        json.dumps(
            {
                "bench": "tokenize beside tokenizers",
                "text_bytes": ours[0]["text_bytes"],
                "tokens": ours[0]["tokens"],
                "rounds": arguments.rounds,
                "looptrain_megabytes_per_second": round(speed(ours), 3),
                "peer_megabytes_per_second": {m: round(s, 3) for m, s in peers.items()},
                "ratio": round(ratio, 3),
                "looptrain_peak_bytes": max(f["peak_bytes"] for f in ours),
                "peer_peak_bytes": max(f["peak_bytes"] for rs in theirs.values() for f in rs),
                "machine": ours[0]["machine"],
            }
        )
    )
    sys.exit(0 if ratio >= TARGET else 1)


if __name__ == "__main__":
    main()
