#!/usr/bin/env python3
"""The proof on a GPU; see prove.sh."""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["heads", "curves", "gate", "bits", "nccl", "step", "peer"]
STEPS = 200
GATE_STEPS = 100

# Ouro-1.4B's own shape and a step of one sequence, and a model of 306 million parameters.
SHAPES = {
    "1.4b": {"hidden": 2048, "layers": 24, "loops": 4, "heads": 16, "ffn": 5632, "vocab": 49152, "batch": 1, "sequence": 4096},
    "0.3b": {"hidden": 1024, "layers": 16, "loops": 4, "heads": 8, "ffn": 2816, "vocab": 49152, "batch": 2, "sequence": 4096},
}
# The peer's names for them.
PEER_NAMES = {"hidden": "d", "sequence": "seq"}
# bf16 operations a second that the data sheet gives for an H100 with SXM.
SHEET_RATE = 990e12
# At least this share of it on the first shape, at most this price of exact sums, and beside compiled
# PyTorch at least as fast in at most this share of its memory.
MFU, EXACT, MEMORY = 0.40, 1.05, 0.7
# A curve may be so far from the other in the mean over ten steps, and a loss before the first update, which
# only the forward pass makes, so far from the CPU's.
FAR, NEAR = 0.02, 0.001


def say(text):
    """Progress, beside the results."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


START = time.monotonic()


def run(command, seconds=300, **options):
    """Runs a command to its end; its stdout, or None after a word on what went wrong."""
    command = [str(part) for part in command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1), **options)
    except FileNotFoundError:
        say(f"there is no program {command[0]}")
        return None
    except subprocess.TimeoutExpired:
        say(f"{' '.join(command[:4])} ... took more than {seconds:.0f} s")
        return None
    if done.returncode != 0:
        say(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-1500:]}")
        return None
    return done.stdout


class Small:
    """A small run with a store of its own."""

    def __init__(self, looptrain, folder, name, device):
        self.looptrain, self.folder, self.name, self.device = looptrain, folder, name, device
        texts = json.dumps([str(ROOT / part) for part in ("model", "worker", "coordinator", "storage")])
        values = {
            "run.name": json.dumps(name),
            "run.store": json.dumps(f"file://{folder}"),
            "cluster.workers": 1,
            "datasets.0.source.paths": texts,
            "stages.0.steps": STEPS,
            "checkpoint.every_steps": 50,
            "sample.tokens": 0,
        }
        self.spec = [ROOT / "examples" / "tiny.toml"]
        for key, value in values.items():
            self.spec += ["--set", f"{key}={value}"]

    def train(self, *more):
        """Runs it; the last line's fields."""
        found = run([self.looptrain, "train", *self.spec, "--device", self.device, *more])
        return fields(found)

    def gate(self, device):
        """Trains its gate there; the gate's losses, and the losses at equal depth before and after."""
        name = f"{self.name}-gate-{device.replace(':', '')}"
        source = ["--from", f"file://{self.folder}/runs/{self.name}", "--run", name, "--workers", 1]
        found = run([self.looptrain, "gate", *source, "--steps", GATE_STEPS, "--device", device, "--json"])
        if found is None:
            return None
        return self.losses(name), json.loads(found)["at_equal_depth"]

    def losses(self, name=None):
        """Loss by step."""
        steps = {}
        for file in sorted((self.folder / "runs" / (name or self.name) / "metrics").glob("*.jsonl")):
            for line in file.read_text().splitlines():
                record = json.loads(line)
                steps[record["step"]] = record["loss"]
        return [steps[step] for step in sorted(steps)]

    def two_workers(self, *more, kill=True):
        """Two workers on one device, one of which is killed; the last line's fields, and whether it was."""
        listen = "127.0.0.1:7461"
        # Several ranks of NCCL on one device, which only a test wants.
        variables = {**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
        coordinator = subprocess.Popen(
            [str(part) for part in [self.looptrain, "coordinator", *self.spec, "--set", "cluster.workers=2", *more, "--listen", listen]],
            stdout=subprocess.PIPE, stderr=(self.folder / f"{self.name}.log").open("w"), text=True,
        )
        workers = []
        for fault in (["--fault", "kill@reduce:60"] if kill else [], []):
            command = [self.looptrain, "worker", "--coordinator", f"http://{listen}", "--device", self.device, *fault]
            log = (self.folder / f"{self.name}-{len(workers)}.log").open("w")
            workers.append(subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=log, env=variables))
        try:
            found, _ = coordinator.communicate(timeout=240)
            killed = workers[0].wait(timeout=30) == -9
            self.over_nccl = "over NCCL" in (self.folder / f"{self.name}.log").read_text()
        except subprocess.TimeoutExpired:
            return None, False
        finally:
            for process in [coordinator, *workers]:
                process.kill()
                process.wait()
        return fields(found), killed


def fields(stdout):
    """The fields of the last line that a run prints."""
    if not stdout:
        return None
    return dict(re.findall(r"(\w+)=(\S+)", stdout.strip().splitlines()[-1]))


def means(losses):
    """Over ten steps each."""
    return [sum(losses[at:at + 10]) / 10 for at in range(0, len(losses) - 9, 10)]


def heads(arguments, _folder, results):
    """Some steps on one batch with every size of heads, whose kernels differ."""
    missed = []
    for size in (16, 32, 64, 128):
        losses = {}
        for device in ("cpu", arguments.device):
            shape = ["--hidden", 4 * size, "--heads", 4, "--layers", 2, "--ffn", 8 * size, "--vocab", 1024]
            command = [arguments.looptrain, "bench", "step", *shape, "--batch", 2, "--sequence", 300, "--steps", 10]
            found = run([*command, "--device", device, "--reduction", "none", "--slots", 1])
            if found is None:
                return missed + [f"heads: no steps with heads of {size} on {device}"]
            found = json.loads(found.strip().splitlines()[-1])
            losses[device] = [found["first_loss"], found["loss"]]
        first, last = (abs(a / b - 1) for a, b in zip(losses[arguments.device], losses["cpu"]))
        results.setdefault("heads", {})[size] = losses
        say(f"heads of {size}: {losses}")
        if not (first < NEAR and last < FAR):
            missed.append(f"heads: of {size}: {losses}")
    return missed


def curves(arguments, folder, results):
    """The same run on the CPU and on the GPU."""
    found = {}
    for device in ("cpu", arguments.device):
        small = Small(arguments.looptrain, folder, "on-" + device.replace(":", ""), device)
        if small.train() is None:
            return ["curves: no run on " + device]
        found[device] = small.losses()
    ours, exact = found[arguments.device], found["cpu"]
    far = max(abs(a / b - 1) for a, b in zip(means(ours), means(exact)))
    results["curves"] = {"steps": len(ours), "first": [exact[0], ours[0]], "last_ten": [means(exact)[-1], means(ours)[-1]], "farthest_ten_steps": round(far, 5)}
    draw(arguments.out / "curves.svg", exact, ours)
    say(f"curves: {results['curves']}")
    right = len(ours) == len(exact) == STEPS and far < FAR
    return [] if right else [f"curves: {far:.4f} apart"]


def gate(arguments, folder, results):
    """The gate of one trained model, trained on the CPU and on the GPU."""
    small = Small(arguments.looptrain, folder, "gated", "cpu")
    if small.train() is None:
        return ["gate: no run"]
    exact, ours = (small.gate(device) for device in ("cpu", arguments.device))
    if exact is None or ours is None:
        return ["gate: no gate"]
    far = max(abs(a / b - 1) for a, b in zip(means(ours[0]), means(exact[0])))
    depths = max(abs(a["after"] / b["after"] - 1) for a, b in zip(ours[1], exact[1]))
    results["gate"] = {"steps": len(ours[0]), "last_ten": [means(exact[0])[-1], means(ours[0])[-1]], "farthest_ten_steps": round(far, 5), "farthest_at_equal_depth": round(depths, 5)}
    say(f"gate: {results['gate']}")
    right = len(ours[0]) == len(exact[0]) == GATE_STEPS and far < FAR and depths < NEAR
    return [] if right else [f"gate: {results['gate']}"]


def draw(path, exact, ours):
    """Both curves, one over the other."""
    width, height, top = 720, 320, max(exact + ours)
    low = min(exact + ours)

    def line(losses, color, extra):
        points = (f"{40 + at * (width - 60) / (len(losses) - 1):.1f},{20 + (top - loss) / (top - low) * (height - 60):.1f}" for at, loss in enumerate(losses))
        return f'<polyline fill="none" stroke="{color}" {extra} points="{" ".join(points)}"/>'

    text = 'font-family="sans-serif" font-size="12" fill="#444"'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="Loss by step on the CPU and on the GPU">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        + line(exact, "#c2410c", 'stroke-width="4" stroke-opacity="0.45"')
        + line(ours, "#1d4ed8", 'stroke-width="1.2"')
        + f'<text x="40" y="{height - 8}" {text}>loss of {len(ours)} steps, {top:.2f} to {low:.2f}; wide: f32 on the CPU, thin: bf16 on the GPU</text></svg>\n'
    )


def bits(arguments, folder, results):
    """The same weights, whatever happens."""
    def small(name):
        return Small(arguments.looptrain, folder, name, arguments.device)

    first = small("bits-first").train()
    if first is None:
        return ["bits: no run"]
    found = {"again": small("bits-again").train(), "layers_again": small("bits-layers").train("--set", 'compute.recompute="layer"')}
    stopped = small("bits-stopped")
    half = stopped.train("--until", "90")
    found["resumed"] = stopped.train() if half and half.get("step") == "90" else None
    found["two_workers"], killed = small("bits-two").two_workers()
    same = {name: bool(end) and end.get("weights") == first["weights"] for name, end in found.items()}
    results["bits"] = {"weights": first["weights"], "same": same, "one_was_killed": killed}
    say(f"bits: {results['bits']}")
    missed = [f"bits: {name} has other weights" for name, right in same.items() if not right]
    return missed + ([] if killed else ["bits: nobody was killed"])


def nccl(arguments, folder, results):
    """Two workers that reduce over NCCL, on one device: the same weights as one, also when one is killed."""
    def small(name):
        return Small(arguments.looptrain, folder, name, arguments.device)

    first = results.get("bits") or small("nccl-first").train()
    if first is None:
        return ["nccl: no run"]
    missed, found = [], {}
    for name, more, kill in [
        ("exact", [], False),
        ("killed", [], True),
        ("fast", ["--set", "cluster.reduction=fast"], False),
        ("fast-bf16", ["--set", "cluster.reduction=fast-bf16"], False),
    ]:
        run_of = small("nccl-" + name)
        run_of.over_nccl = False
        start = time.monotonic()
        end, killed = run_of.two_workers("--set", "cluster.collective=nccl", *more, kill=kill)
        same = bool(end) and end.get("weights") == first["weights"]
        found[name] = {"seconds": round(time.monotonic() - start, 1), "over_nccl": run_of.over_nccl, "same": same, "killed": killed, "loss": end and end.get("loss")}
        if end is None:
            log = folder / f"nccl-{name}-1.log"
            say(f"nccl: {name}: {log.read_text()[-1500:] if log.exists() else 'no log'}")
            missed.append(f"nccl: {name} did not end")
        elif not run_of.over_nccl or killed != kill or (not same and not name.startswith("fast")):
            missed.append(f"nccl: {name}: {found[name]}")
    for name in ("fast", "fast-bf16"):
        if found[name]["loss"] and found["exact"]["loss"]:
            apart = abs(float(found[name]["loss"]) / float(found["exact"]["loss"]) - 1)
            if apart > FAR:
                missed.append(f"nccl: the loss of {name} sums is {apart:.4f} from that of exact ones")
    results["nccl"] = found
    say(f"nccl: {found}")
    return missed


def step(arguments, _folder, results):
    """Our own step."""
    missed = []
    for shape, sizes in SHAPES.items():
        for reduction in ("none", "exact"):
            options = [part for name, size in sizes.items() for part in (f"--{name}", size)]
            command = [arguments.looptrain, "bench", "step", *options, "--steps", 7, "--slots", 1]
            found = run([*command, "--device", arguments.device, "--reduction", reduction])
            if found is None:
                missed.append(f"step: {shape} with {reduction} failed")
                continue
            found = json.loads(found.strip().splitlines()[-1])
            rate = found["gflop_per_second"] * 1e9
            short = {
                "seconds": found["median_seconds"],
                "tokens_per_second": found["tokens_per_second"],
                "mfu": round(rate / SHEET_RATE, 4),
                "share_of_matrix_rate": found["share_of_matrix_rate"],
                "matrix_gflop_per_second": found["matrix_gflop_per_second"],
                "device_peak_bytes": found["device_peak_bytes"],
                "sections": found["sections"],
            }
            results.setdefault("step", {})[f"{shape} {reduction}"] = short
            say(f"step: {shape} {reduction}: " + ", ".join(f"{key} {short[key]}" for key in list(short)[:6]))
            save(arguments, results)
    return missed + behind(results)


def behind(results):
    """What misses its goal."""
    missed, steps = [], results.get("step", {})
    for shape in SHAPES:
        fast, exact = steps.get(f"{shape} none"), steps.get(f"{shape} exact")
        if fast and exact and exact["seconds"] > EXACT * fast["seconds"]:
            missed.append(f"step: {shape}: exact sums take {exact['seconds'] / fast['seconds']:.3f} times the time, goal {EXACT}")
    large = steps.get("1.4b none")
    if large and large["mfu"] < MFU:
        missed.append(f"step: MFU {large['mfu']}, goal {MFU}")
    for name, found in results.get("peer", {}).items():
        if found and name.endswith("compile") and "ratio" in found:
            if found["ratio"] < 1:
                missed.append(f"peer: {name}: {found['ratio']} times as fast, goal 1")
            if found["memory_ratio"] > MEMORY:
                missed.append(f"peer: {name}: {found['memory_ratio']} of its memory, goal {MEMORY}")
    return missed


def peer(arguments, _folder, results):
    """The same steps in PyTorch."""
    if arguments.reference is None:
        say("peer: left out, without --reference")
        return []
    for mode, shape in (("bf16", "0.3b"), ("compile", "0.3b"), ("compile", "1.4b"), ("bf16", "1.4b")):
        left = arguments.minutes * 60 - (time.monotonic() - START)
        if left < 30:
            say(f"peer: no time left for {mode} {shape}")
            break
        options = [part for name, size in SHAPES[shape].items() for part in (f"--{PEER_NAMES.get(name, name)}", size)]
        found = run([sys.executable, arguments.reference, "bench", *options, "--device", "cuda", "--mode", mode, "--steps", 5], left)
        if found is None:
            results.setdefault("peer", {})[f"{shape} {mode}"] = None
            continue
        found = json.loads(found.strip().splitlines()[-1])
        ours = results.get("step", {}).get(f"{shape} none")
        if ours:
            found["ratio"] = round(ours["tokens_per_second"] / found["tokens_per_s"], 3)
            found["memory_ratio"] = round(ours["device_peak_bytes"] / found["peak_bytes"], 3)
        results.setdefault("peer", {})[f"{shape} {mode}"] = found
        say(f"peer: {shape} {mode}: {found}")
        save(arguments, results)
    return [goal for goal in behind(results) if goal.startswith("peer")]


def save(arguments, results):
    """What is known by now."""
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def main():
    """All parts, or those that are asked for."""
    target = Path(os.environ.get("CARGO_TARGET_DIR") or ROOT / "target")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--looptrain", type=Path, default=target / "release" / "looptrain", help="the program")
    parser.add_argument("--device", default="cuda:0", help="where to prove it")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "gpu", help="for results.json and curves.svg")
    parser.add_argument("--reference", type=Path, help="the LoopLM in PyTorch to compare with")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it; the peer gets what is left")
    parser.add_argument("--only", action="append", choices=PARTS, help="may be repeated; all by default")
    arguments = parser.parse_args()
    arguments.looptrain = arguments.looptrain.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not os.access(arguments.looptrain, os.X_OK):
        sys.exit(f"there is no program {arguments.looptrain}; build it with `cargo build --release`, or name it with --looptrain")
    query = run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]) or "unknown"
    results = {"date": datetime.date.today().isoformat(), "device": query.strip().splitlines()[0], "program": (run([arguments.looptrain, "--version"]) or "").strip()}
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            if arguments.only is None or part in arguments.only:
                missed += globals()[part](arguments, Path(folder), results)
                results["missed"] = missed
                save(arguments, results)
    print(json.dumps({key: results.get(key) for key in ("date", "device", "missed")}))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
