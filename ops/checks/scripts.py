"""Scripts for Slurm: what bash and shellcheck say of them, and that they do what they say.

There is no Slurm here. The scripts run with a `looptrain` and a `scontrol` that stand in for the real ones and write
down what they are told; signals come as Slurm sends them: to the script alone ahead of the time limit
(--signal=B:USR1), to all its processes when the job is ended.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Longer than anything here takes.
PATIENCE = 60

STAND_IN = """#!{python}
import json, os, signal, sys, time
folder = os.environ["STAND_IN"]
def note(what):
    with open(os.path.join(folder, "notes"), "a") as file:
        file.write(json.dumps(what) + "\\n")
def told(number, frame):
    note(["signal", signal.Signals(number).name])
    if os.path.basename(sys.argv[0]) == "looptrain":
        time.sleep(0.2)
        sys.exit(0)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGUSR1, told)
note([os.path.basename(sys.argv[0]), *sys.argv[1:]])
if os.path.basename(sys.argv[0]) == "scontrol":
    sys.exit(0)
notice = next((word[5:] for word in sys.argv if word.startswith("file:")), None)
for _ in range(1000):
    if notice and os.path.exists(notice):
        note(["left"])
        sys.exit(0)
    end = os.path.join(folder, "end")
    if os.path.exists(end):
        status = int(open(end).read())
        os.remove(end)
        sys.exit(status)
    time.sleep(0.02)
"""


class Job:
    """A script that runs as Slurm would have it run."""

    def __init__(self, script, environment, coordinator="https://node001:7400"):
        self.folder = Path(tempfile.mkdtemp(prefix="looptrain-slurm-"))
        self.run = self.folder / "web"
        self.run.mkdir()
        (self.run / "store.env").write_text("AWS_REGION=here\n")
        if coordinator:
            (self.run / "coordinator").write_text(f"{coordinator}\n")
        programs = self.folder / "bin"
        programs.mkdir()
        for name in ("looptrain", "scontrol"):
            (programs / name).write_text(STAND_IN.format(python=sys.executable))
            (programs / name).chmod(0o755)
        usual = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "STAND_IN": str(self.folder),
            "TMPDIR": str(self.folder),
            "LOOPTRAIN_RUN": str(self.run),
            "SLURM_JOB_ID": "42",
            "SLURMD_NODENAME": "node007",
        }
        self.process = subprocess.Popen(
            ["bash", str(script)],
            env={**usual, **environment},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.communicate()
        shutil.rmtree(self.folder)

    def notes(self, kind=None):
        file = self.folder / "notes"
        lines = file.read_text().splitlines() if file.exists() else []
        notes = [json.loads(line) for line in lines]
        return [note[1:] for note in notes if note[0] == kind] if kind else notes

    def started(self, times=1):
        """What the program was started with, the last time of so many."""
        end = time.monotonic() + PATIENCE
        while len(self.notes("looptrain")) < times:
            if time.monotonic() > end or self.process.poll() is not None:
                raise Wrong(f"the program was not started: {self.process.communicate(timeout=PATIENCE)[0]}")
            time.sleep(0.02)
        time.sleep(0.1)
        return self.notes("looptrain")[times - 1]

    def end(self, status):
        """Has the program end."""
        (self.folder / "part").write_text(str(status))
        (self.folder / "part").rename(self.folder / "end")

    def near_the_time_limit(self):
        os.kill(self.process.pid, signal.SIGUSR1)

    def is_ended(self):
        os.killpg(self.process.pid, signal.SIGTERM)

    def status(self):
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise Wrong("the script does not end") from None


class Wrong(Exception):
    """A script does something else than it says."""


def want(holds, what):
    if not holds:
        raise Wrong(what)


def a_coordinator_says_where_it_is_until_the_run_is_over(script):
    with Job(script, {}) as job:
        job.started()
        want((job.run / "coordinator").read_text() == "https://node007:7400\n", "workers cannot find it")
        target = job.run / "targets/coordinator-web.yml"
        want('"node007:8080"' in target.read_text(), "Prometheus cannot find it")
        job.end(0)
        want(job.status() == 0, "it fails when the run is done")
        want(not target.exists(), "Prometheus goes on looking for it")
        want(not job.notes("scontrol"), "it is queued again when the run is done")


def a_coordinator_hands_over_at_the_time_limit(script):
    with Job(script, {}) as job:
        job.started()
        job.near_the_time_limit()
        job.status()
        want(not job.notes("signal"), "the program is told to stop, and would send its workers home")
        want(job.notes("scontrol") == [["requeue", "42"]], "it is not queued again")


def a_coordinator_that_is_ended_is_told_once(script):
    with Job(script, {}) as job:
        job.started()
        job.is_ended()
        want(job.status() == 0, "it fails when it is stopped")
        want(job.notes("signal") == [["SIGTERM"]], "the program gets no signal, or more than one")
        want(not job.notes("scontrol"), "it is queued again")


def a_coordinator_that_fails_fails_its_job(script):
    with Job(script, {}) as job:
        job.started()
        job.end(3)
        want(job.status() == 3, "it hides that the program has failed")


def a_worker_takes_the_gpu_that_it_is_shown(script):
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "40"}
    for environment, device in (({"CUDA_VISIBLE_DEVICES": "3"}, "cuda:0"), ({}, "cpu")):
        with Job(script, {**array, **environment}) as job:
            words = job.started()
            want(words[words.index("--device") + 1] == device, f"its device is not {device}")
            want(words[words.index("--metrics") + 1] == "0.0.0.0:9105", "another task may have its port")
            want(words[words.index("--name") + 1] == "slurm-40-5", "its name is another one each time")
            want(words[words.index("--coordinator") + 1] == "https://node001:7400", "it goes elsewhere")
            target = job.run / "targets/worker-slurm-40-5.yml"
            want('"node007:9105"' in target.read_text(), "Prometheus cannot find it")
            job.end(0)
            want(job.status() == 0 and not target.exists(), "Prometheus goes on looking for it")


def a_worker_waits_for_a_coordinator_that_is_yet_to_start(script):
    with Job(script, {}, coordinator=None) as job:
        time.sleep(0.5)
        want(job.process.poll() is None, "it fails without a coordinator")
        want(not job.notes("looptrain"), "the program is started without an address")
        (job.run / "coordinator").write_text("https://node003:7400\n")
        words = job.started()
        want(words[words.index("--coordinator") + 1] == "https://node003:7400", "it goes elsewhere")
        job.end(0)
        want(job.status() == 0, "it fails when the run is over")


def a_worker_leaves_before_the_time_limit_and_comes_again(script):
    with Job(script, {}) as job:
        job.started()
        job.near_the_time_limit()
        want(job.status() == 0, "it fails when it leaves")
        want(job.notes("left") and not job.notes("signal"), "it does not leave by the notice")
        want(job.notes("scontrol") == [["requeue", "42"]], "it is not queued again")


def a_worker_that_is_ended_is_told_once(script):
    with Job(script, {}) as job:
        job.started()
        job.is_ended()
        job.status()
        want(job.notes("signal") == [["SIGTERM"]], "the program gets no signal, or more than one")
        want(not job.notes("scontrol"), "it is queued again")


def a_worker_goes_where_the_coordinator_has_gone(script):
    with Job(script, {}) as job:
        job.started()
        (job.run / "coordinator").write_text("https://node002:7400\n")
        job.end(1)
        words = job.started(times=2)
        want(words[words.index("--coordinator") + 1] == "https://node002:7400", "it goes to the old one")
        job.end(1)
        want(job.status() == 1, "it hides that the program has failed")
        want(len(job.notes("looptrain")) == 2, "it goes on although there is no other coordinator")


SCENES = {
    "coordinator.sbatch": [
        a_coordinator_says_where_it_is_until_the_run_is_over,
        a_coordinator_hands_over_at_the_time_limit,
        a_coordinator_that_is_ended_is_told_once,
        a_coordinator_that_fails_fails_its_job,
    ],
    "workers.sbatch": [
        a_worker_takes_the_gpu_that_it_is_shown,
        a_worker_waits_for_a_coordinator_that_is_yet_to_start,
        a_worker_leaves_before_the_time_limit_and_comes_again,
        a_worker_that_is_ended_is_told_once,
        a_worker_goes_where_the_coordinator_has_gone,
    ],
}


def started_by(ops):
    """The command lines of the scripts, as the program gets them."""
    lines = []
    for name in SCENES:
        for environment in ({}, {"CUDA_VISIBLE_DEVICES": "3", "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "40"}):
            with Job(ops / "slurm" / name, environment) as job:
                words = job.started()
                lines.append([word.replace(str(job.folder), "/shared") for word in words])
    return lines


def check(ops):
    """Troubles, and what was left out."""
    troubles, left_out = [], []
    scripts = sorted((ops / "slurm").glob("*.sbatch"))
    for path in scripts:
        place = path.relative_to(ops)
        ran = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            troubles.append(f"{place}: {ran.stderr.strip()}")
            continue
        if shutil.which("shellcheck") is None:
            left_out.append("what shellcheck says of scripts, for it is not there")
        else:
            words = ["shellcheck", "--shell=bash", "--format=gcc", str(path)]
            ran = subprocess.run(words, capture_output=True, text=True, check=False)
            troubles += [line.replace(f"{ops}/", "") for line in ran.stdout.splitlines()]
        if path.name not in SCENES:
            troubles.append(f"{place}: this check has no scene for it")
        if not re.search(r"(?m)^#SBATCH --signal=B:USR1@\d+$", path.read_text()):
            troubles.append(f"{place}: it is not told that the time limit is near")
        for scene in SCENES.get(path.name, []):
            try:
                scene(path)
            except (Wrong, OSError, ValueError) as error:
                troubles.append(f"{place}: {scene.__name__.replace('_', ' ')}: {error}")
    return troubles, left_out
