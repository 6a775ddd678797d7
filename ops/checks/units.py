"""Units of systemd: that it takes them, how much it lets them do, and that a restart is thought of."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

PROGRAM = "/usr/local/bin/looptrain"

# Of systemd-analyze's ten: what a unit may be exposed to.
EXPOSURE = 2.5


def settings(text):
    """Names and values of a unit, in order; a list of pairs, for names may come again."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (line.strip() for line in joined.splitlines())
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#;[")
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def check(ops):
    """Troubles, and what was left out."""
    troubles, left_out = [], []
    for path in sorted((ops / "systemd").glob("*.service")):
        place = path.relative_to(ops)
        text = path.read_text()
        given = settings(text)
        values = dict(given)
        for name in ("Restart", "TimeoutStopSec", "User", "LimitNOFILE"):
            if not values.get(name):
                troubles.append(f"{place}: {name} is not said")
        if values.get("User") in ("root", "0"):
            troubles.append(f"{place}: it runs as root")
        if "ExecStop" in values or values.get("KillSignal", "SIGTERM") != "SIGTERM":
            troubles.append(f"{place}: SIGTERM is what asks for an orderly end, once")
        if not values.get("ExecStart", "").startswith(f"{PROGRAM} "):
            troubles.append(f"{place}: it does not start {PROGRAM}")
        if shutil.which("systemd-analyze") is None:
            left_out.append("units, for systemd-analyze is not there")
            continue
        with tempfile.TemporaryDirectory() as folder:
            # The program is not installed here; one that is stands in for it.
            unit = Path(folder, path.name.replace("@", "@0"))
            unit.write_text(text.replace(PROGRAM, "/bin/true"))
            ran = analyze("verify", "--man=no", str(unit))
            if ran.returncode != 0 or ran.stderr.strip():
                troubles.append(f"{place}: {ran.stderr.strip().replace(folder, '')}")
            ran = analyze("security", "--offline=true", "--no-pager", str(unit))
            exposure = re.search(r"exposure level for \S+: ([0-9.]+)", ran.stdout)
            if exposure is None:
                left_out.append("the exposure of units, for this systemd-analyze does not tell it")
            elif float(exposure[1]) > EXPOSURE:
                troubles.append(f"{place}: its exposure is {exposure[1]}, above {EXPOSURE}")
    return troubles, left_out


def analyze(*words):
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)
