"""Manifests: kustomize renders each tree of them, and every object keeps to its schema.

The schemas are those that Kubernetes publishes, strict: a field that there is not is an error. Those of cert-manager
and of the Prometheus operator are not among them; what is used of theirs is written down here.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# Of these each object must be valid: the oldest release that its makers still mend, and the newest one.
RELEASES = ("1.34", "1.37")

# What is rendered: folders, and the base with each component, which no folder has by itself.
COMPONENTS = ("cert-manager", "monitoring", "otlp", "spot")
TREES = {
    "base": ["base"],
    "cpu": ["cpu"],
    "gpu": ["gpu"],
    **{f"base with {name}": ["base", name] for name in COMPONENTS},
    "gpu with otlp and spot": ["gpu", "otlp", "spot"],
    "gpu with nccl": ["gpu", "nccl"],
}

LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": LABELS},
}


def closed(properties, required=()):
    """An object that has these properties and no others."""
    return {
        "type": "object",
        "required": list(required),
        "additionalProperties": False,
        "properties": properties,
    }


def listed(items):
    return {"type": "array", "minItems": 1, "items": items}


TEXT = {"type": "string", "minLength": 1}
DURATION = {"type": "string", "pattern": r"^([0-9]+h)?([0-9]+m)?([0-9]+s)?$"}
KEY_OF_SECRET = closed({"name": TEXT, "key": TEXT}, ["name", "key"])
ISSUER = closed({"name": TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}}, ["name", "kind"])
ENDPOINT = closed(
    {
        "port": TEXT,
        "path": TEXT,
        "scheme": {"enum": ["http", "https"]},
        "interval": DURATION,
        "tlsConfig": closed(
            {"serverName": TEXT, "ca": closed({"secret": KEY_OF_SECRET}, ["secret"])}, ["serverName", "ca"]
        ),
        "authorization": closed({"type": TEXT, "credentials": KEY_OF_SECRET}, ["credentials"]),
        "relabelings": listed(
            closed({"sourceLabels": listed(TEXT), "targetLabel": TEXT, "replacement": TEXT}, ["targetLabel"])
        ),
    },
    ["port", "scheme", "tlsConfig", "authorization"],
)
SELECTOR = closed({"matchLabels": LABELS}, ["matchLabels"])

# By apiVersion and kind: the shape of `spec`.
OTHERS = {
    ("cert-manager.io/v1", "Issuer"): {
        **closed({"selfSigned": closed({}), "ca": closed({"secretName": TEXT}, ["secretName"])}),
        "minProperties": 1,
        "maxProperties": 1,
    },
    ("cert-manager.io/v1", "Certificate"): closed(
        {
            "isCA": {"type": "boolean"},
            "commonName": TEXT,
            "secretName": TEXT,
            "duration": DURATION,
            "renewBefore": DURATION,
            "privateKey": closed(
                {
                    "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]},
                    "size": {"type": "integer"},
                    "encoding": {"enum": ["PKCS1", "PKCS8"]},
                    "rotationPolicy": {"enum": ["Always", "Never"]},
                }
            ),
            "usages": listed({"enum": ["digital signature", "server auth", "client auth", "cert sign"]}),
            "uris": listed(TEXT),
            "dnsNames": listed(TEXT),
            "ipAddresses": listed(TEXT),
            "issuerRef": ISSUER,
        },
        ["secretName", "issuerRef"],
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): closed(
        {"selector": SELECTOR, "endpoints": listed(ENDPOINT)}, ["selector", "endpoints"]
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): closed(
        {"selector": SELECTOR, "podMetricsEndpoints": listed(ENDPOINT)}, ["selector", "podMetricsEndpoints"]
    ),
}


def kubectl():
    """The program that renders, if it is there."""
    return shutil.which("kubectl")


@functools.cache
def rendered(ops):
    """Each tree's objects, and what went wrong; nothing without kubectl."""
    import yaml

    trees, troubles = {}, []
    if kubectl() is None:
        return trees, troubles
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "kubernetes")
        shutil.copytree(ops / "kubernetes", copy)
        # No cluster is asked for anything: no address of one is known there.
        environment = {**os.environ, "HOME": folder, "KUBECONFIG": os.devnull}
        for name, (root, *components) in TREES.items():
            top = copy / root
            if components:
                top = copy / "rendered"
                top.mkdir(exist_ok=True)
                kustomization = {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "namespace": "looptrain",
                    "resources": [f"../{root}"],
                    "components": [f"../{component}" for component in components],
                }
                (top / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
            ran = subprocess.run(
                [kubectl(), "kustomize", str(top)], env=environment, capture_output=True, text=True, check=False
            )
            if ran.returncode != 0:
                troubles.append(f"kubernetes, {name}: it cannot be rendered: {ran.stderr.strip()}")
                continue
            trees[name] = [it for it in yaml.safe_load_all(ran.stdout) if it]
    return trees, troubles


def secrets(ops):
    """The templates of secrets, by path."""
    import yaml

    return {path: yaml.safe_load(path.read_text()) for path in sorted((ops / "kubernetes/secrets").glob("*.yaml"))}


def count(ops):
    return sum(len(objects) for objects in rendered(ops)[0].values())


def title(it):
    return f"{it.get('kind')} {it.get('metadata', {}).get('name')}"


def check(ops):
    """Troubles, and what was left out."""
    try:
        import jsonschema
        import kubernetes_validate
    except ImportError:
        return [], ["schemas of manifests, for kubernetes-validate is not installed"]
    trees, troubles = rendered(ops)
    left_out = [] if kubectl() else ["manifests, for kubectl is not there"]
    places = [(f"kubernetes, {name}", it) for name, objects in trees.items() for it in objects]
    places += [(str(path.relative_to(ops)), it) for path, it in secrets(ops).items()]
    for place, it in places:
        shape = OTHERS.get((it.get("apiVersion"), it.get("kind")))
        try:
            if shape is not None:
                jsonschema.validate(it.get("metadata"), METADATA)
                jsonschema.validate(it.get("spec"), shape)
                if unknown := set(it) - {"apiVersion", "kind", "metadata", "spec"}:
                    troubles.append(f"{place}: {title(it)}: unknown {', '.join(unknown)}")
                continue
            for release in RELEASES:
                kubernetes_validate.validate(it, release, strict=True)
        except jsonschema.ValidationError as error:
            where = "/".join(str(part) for part in error.absolute_path)
            troubles.append(f"{place}: {title(it)}: {where}: {error.message[:300]}")
        except kubernetes_validate.SchemaNotFoundError as error:
            troubles.append(f"{place}: {title(it)}: {error.message}")
    return list(dict.fromkeys(troubles)), left_out
