"""Every command line of the program in what is deployed, and in the guide: for a test that has the program read them.

Variables are filled in with what they may be; the words are those behind the program's name.
"""

import re
import shlex

import scripts
import units
from manifests import rendered

GUIDE = "docs/deployment.md"


def of_manifests(ops):
    lines = []
    for objects in rendered(ops)[0].values():
        for it in objects:
            if it["kind"] not in ("Deployment", "StatefulSet"):
                continue
            for container in it["spec"]["template"]["spec"]["containers"]:
                words = container.get("command", [])[1:] + container.get("args", [])
                lines.append([re.sub(r"\$\([A-Z_]+\)", "looptrain-worker-0", word) for word in words])
    return lines


def of_units(ops):
    lines = []
    given = dict(units.settings((ops / "systemd/worker.env").read_text()))
    for path in sorted((ops / "systemd").glob("*.service")):
        pairs = units.settings(path.read_text())
        variables = dict(value.split("=", 1) for name, value in pairs if name == "Environment")
        for name, value in pairs:
            if name == "ExecStart":
                filled = re.sub(r"\$\{([A-Z_]+)\}", lambda found: {**variables, **given}[found[1]], value)
                filled = filled.replace("%i", "0").replace("%l", "node")
                lines.append(shlex.split(filled)[1:])
    return lines


def of_guide(ops):
    """Lines of `sh` blocks that begin with the program's name."""
    path = ops.parent / GUIDE
    if not path.exists():
        return []
    lines = []
    for block in re.findall(r"(?ms)^```sh\n(.*?)^```", path.read_text()):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if line.strip().startswith("looptrain "):
                words = shlex.split(line, comments=True)[1:]
                ends = [at for at, word in enumerate(words) if word in ("&", ";", "|", ">", "&&", "2>")]
                lines.append(words[: ends[0]] if ends else words)
    return lines


def all_of(ops):
    """Without those that are there already."""
    found = of_manifests(ops) + of_units(ops) + scripts.started_by(ops) + of_guide(ops)
    return [list(words) for words in dict.fromkeys(tuple(words) for words in found)]
