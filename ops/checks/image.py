"""The image: what hadolint says of the Dockerfile, who runs in it, and that what it copies is let into the build."""

import re
import shutil
import subprocess
import tomllib


def stages(text):
    """Instructions of each stage, by its name."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    found, current = {}, []
    for line in filter(None, (line.strip() for line in joined.splitlines())):
        word, _, rest = line.partition(" ")
        if word.upper() == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found.setdefault(name or base, [])
        current.append((word.upper(), rest.strip()))
    return found


def check(ops):
    """Troubles, and what was left out."""
    place = "docker/Dockerfile"
    path = ops / place
    troubles, left_out = [], []
    found = stages(path.read_text())
    for name in ("cpu", "gpu"):
        if name not in found:
            troubles.append(f"{place}: there is no stage {name}")
    last = dict(found.get("cpu", []))
    if not re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", last.get("USER", "")):
        troubles.append(f"{place}: USER must be two numbers above 0, so that a cluster can tell that it is not root")
    if last.get("ENTRYPOINT") != '["/usr/local/bin/looptrain"]':
        troubles.append(f"{place}: the entry point is the program itself, without a shell")
    if last.get("STOPSIGNAL") != "SIGTERM":
        troubles.append(f"{place}: SIGTERM is what asks for an orderly end")
    for word in ("CMD", "HEALTHCHECK"):
        if word in last:
            troubles.append(f"{place}: {word} would hold for commands of every kind")
    if ("USER", "root") in found.get("gpu", []):
        troubles.append(f"{place}: the stage gpu runs as root")
    troubles += let_in(ops)
    if shutil.which("hadolint") is None:
        left_out.append("the Dockerfile, for hadolint is not there")
    else:
        ran = subprocess.run(["hadolint", "--no-color", str(path)], capture_output=True, text=True, check=False)
        said = (ran.stdout + ran.stderr).strip()
        if ran.returncode != 0 or said:
            troubles.append(f"{place}: hadolint: {said or ran.returncode}")
    return troubles, left_out


def let_in(ops):
    """Every member of the workspace is in the build's context: cargo wants all manifests, whatever it builds."""
    root = ops.parent
    if not (root / "Cargo.toml").exists():
        return []
    place = "docker/Dockerfile.dockerignore"
    lines = (ops / place).read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    members = tomllib.loads((root / "Cargo.toml").read_text())["workspace"]["members"]
    troubles = [
        f"{place}: {member} is a member of the workspace and is left out"
        for member in members
        if not {member, f"{member}/Cargo.toml"} & allowed
    ]
    return troubles + [f"{place}: there is no {name}" for name in sorted(allowed) if not (root / name).exists()]
