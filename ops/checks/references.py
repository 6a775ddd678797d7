"""What manifests say of each other: selectors, ports, secrets, maps, certificates; and what each pod must not do."""

import re
import tomllib

from manifests import rendered, secrets, title

# The program's own. What a secret of a certificate holds, as cert-manager makes it and `--tls` reads it.
OF_CERTIFICATE = {"ca.crt", "tls.crt", "tls.key"}
IDENTITY = re.compile(r"^spiffe://looptrain/(coordinator|worker|operator|viewer)/[A-Za-z0-9._-]{1,128}$")


def template(it):
    return it["spec"]["template"]


def matches(selector, labels):
    """Whether labels are among those that a selector with matchLabels alone takes."""
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())


class Tree:
    """The objects of one tree, by what others ask of them."""

    def __init__(self, name, objects, templates):
        self.name = name
        self.objects = objects
        self.templates = templates
        self.troubles = []

    def of(self, *kinds):
        return [it for it in self.objects if it["kind"] in kinds]

    def wrong(self, it, what):
        self.troubles.append(f"kubernetes, {self.name}: {title(it)}: {what}")

    def workloads(self):
        return self.of("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "Pod")

    def pods(self, selector):
        """Workloads whose pods a selector takes."""
        return [it for it in self.workloads() if matches(selector, template(it)["metadata"]["labels"])]

    def ports(self, workload):
        """Ports of a workload's pods, by name."""
        found = {}
        for container in template(workload)["spec"]["containers"]:
            found.update({port["name"]: port["containerPort"] for port in container.get("ports", [])})
        return found

    def keys_of(self, kind, name):
        """The keys of a secret or a map; None when nobody makes it."""
        field = {"Secret": ("data", "stringData"), "ConfigMap": ("data", "binaryData")}[kind]
        for it in self.of(kind) + ([] if kind == "ConfigMap" else self.templates):
            if it["metadata"]["name"] == name:
                return {key for part in field for key in it.get(part) or {}}
        if kind == "Secret" and self.made_by_hand(name):
            return OF_CERTIFICATE
        return None

    def made_by_hand(self, name):
        """Secrets of certificates: of a Certificate where cert-manager is used, else of `looptrain certs`."""
        certificates = self.of("Certificate")
        if not certificates:
            return name.endswith("-tls")
        return any(it["spec"]["secretName"] == name for it in certificates)


def workload(tree, it):
    spec = template(it)["spec"]
    labels = template(it)["metadata"]["labels"]
    if not matches(it["spec"]["selector"], labels):
        tree.wrong(it, "its selector does not take its own pods")
    for other in tree.workloads():
        if other is not it and matches(it["spec"]["selector"], template(other)["metadata"]["labels"]):
            tree.wrong(it, f"its selector also takes the pods of {title(other)}")
    if spec.get("automountServiceAccountToken") is not False:
        tree.wrong(it, "automountServiceAccountToken must be false")
    if spec.get("terminationGracePeriodSeconds", 30) < 60:
        tree.wrong(it, "terminationGracePeriodSeconds is shorter than a step and a checkpoint may take")
    security = spec.get("securityContext", {})
    if not (security.get("runAsNonRoot") and security.get("runAsUser", 0) > 0):
        tree.wrong(it, "it may run as root: runAsNonRoot, and runAsUser above 0")
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        tree.wrong(it, "seccompProfile must be RuntimeDefault")
    for flag in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(flag):
            tree.wrong(it, f"{flag} is set")
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    for volume in volumes.values():
        source(tree, it, volume)
    used = set()
    for container in spec.get("initContainers", []) + spec["containers"]:
        used |= contained(tree, it, container, volumes)
    for name in volumes.keys() - used:
        tree.wrong(it, f"volume {name} is mounted nowhere")
    if it["kind"] == "StatefulSet":
        named = [other for other in tree.of("Service") if other["metadata"]["name"] == it["spec"]["serviceName"]]
        if not any(other["spec"].get("clusterIP") == "None" for other in named):
            tree.wrong(it, f"there is no headless service {it['spec']['serviceName']}")


def source(tree, it, volume):
    """A volume's secret or map is there, with the keys that are asked of it."""
    for kind, field, key in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
        if (wanted := volume.get(field)) is None:
            continue
        keys = tree.keys_of(kind, wanted[key])
        if keys is None:
            tree.wrong(it, f"volume {volume['name']}: nobody makes the {kind} {wanted[key]}")
            continue
        for item in wanted.get("items", []):
            if item["key"] not in keys:
                tree.wrong(it, f"volume {volume['name']}: the {kind} {wanted[key]} has no key {item['key']}")
    if "hostPath" in volume:
        tree.wrong(it, f"volume {volume['name']} is of the host")
    if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
        tree.wrong(it, f"volume {volume['name']} has no sizeLimit")


def contained(tree, it, container, volumes):
    """A container; the volumes that it mounts."""
    say = lambda what: tree.wrong(it, f"container {container['name']}: {what}")
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False:
        say("allowPrivilegeEscalation must be false")
    if security.get("readOnlyRootFilesystem") is not True:
        say("readOnlyRootFilesystem must be true")
    if security.get("capabilities", {}) != {"drop": ["ALL"]}:
        say("its capabilities must be to drop ALL")
    if security.get("privileged") or security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False:
        say("it may run as root")
    resources = container.get("resources", {})
    for what in ("cpu", "memory"):
        if what not in resources.get("requests", {}):
            say(f"it requests no {what}")
    if "memory" not in resources.get("limits", {}):
        say("its memory has no limit")
    names = {port["name"] for port in container.get("ports", [])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container.get(probe, {})
        port = (asked.get("tcpSocket") or asked.get("httpGet") or {}).get("port")
        if isinstance(port, str) and port not in names:
            say(f"{probe} asks port {port}, which there is not")
    for entry in container.get("envFrom", []):
        for kind, field in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
            if field in entry and tree.keys_of(kind, entry[field]["name"]) is None:
                say(f"nobody makes the {kind} {entry[field]['name']}")
    variables = {variable["name"] for variable in container.get("env", [])}
    for word in container.get("args", []):
        for variable in re.findall(r"\$\(([A-Z_]+)\)", word):
            if variable not in variables:
                say(f"{word}: there is no variable {variable}")
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
    for path, mount in mounts.items():
        if mount["name"] not in volumes:
            say(f"{path}: there is no volume {mount['name']}")
        if "subPath" in mount and "secret" in volumes.get(mount["name"], {}):
            say(f"{path}: with subPath a renewed certificate is not seen")
    arguments(say, container, mounts, volumes)
    return {mount["name"] for mount in mounts.values()}


def arguments(say, container, mounts, volumes):
    """Ports that the program is told to listen on are those of the pod; files that it is told are mounted."""
    ports = {port["containerPort"] for port in container.get("ports", [])}
    told = set()
    for word in container.get("args", []):
        flag, _, value = word.partition("=")
        if flag in ("--listen", "--dashboard", "--peer-listen", "--metrics"):
            told.add(int(value.rpartition(":")[2]))
        path = value or word
        if path.startswith("/"):
            mount = next((it for at, it in mounts.items() if path == at or path.startswith(f"{at}/")), None)
            if mount is None:
                say(f"{word} is on no volume")
            elif flag in ("--cache",) and mount.get("readOnly"):
                say(f"{word} cannot be written")
            elif flag == "--tls" and "secret" not in volumes.get(mount["name"], {}):
                say(f"{word} is no secret")
    if told != ports:
        say(f"it listens on {sorted(told)}, and its ports are {sorted(ports)}")


def service(tree, it):
    selected = tree.pods({"matchLabels": it["spec"]["selector"]})
    if len(selected) != 1:
        tree.wrong(it, f"it selects the pods of {len(selected)} workloads, not of one")
        return
    ports = tree.ports(selected[0])
    for port in it["spec"]["ports"]:
        target = port.get("targetPort", port["port"])
        if target not in ports and target not in ports.values():
            tree.wrong(it, f"targetPort {target} is no port of its pods")


def budget(tree, it):
    if not tree.pods(it["spec"]["selector"]):
        tree.wrong(it, "it is about no pods")


def policy(tree, it):
    chosen = tree.pods(it["spec"]["podSelector"])
    if not chosen:
        tree.wrong(it, "it is about no pods")
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        rules = it["spec"].get(direction) or []
        if rules and direction.capitalize() not in it["spec"]["policyTypes"]:
            tree.wrong(it, f"it has {direction} rules and is not of that type")
        for rule in rules:
            others = []
            for peer in rule.get(peers, []):
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    found = tree.pods(peer["podSelector"])
                    if not found:
                        tree.wrong(it, f"{direction}: a selector takes no pods")
                    others += found
            # A named port is one of who is called.
            called = chosen if direction == "ingress" else others
            for port in rule.get("ports", []):
                known = [set(tree.ports(one)) for one in called]
                if isinstance(port["port"], str) and not any(port["port"] in names for names in known):
                    tree.wrong(it, f"{direction}: no pod has a port {port['port']}")


def monitor(tree, it):
    labels = it["spec"]["selector"]
    if it["kind"] == "ServiceMonitor":
        found = [one for one in tree.of("Service") if matches(labels, one["metadata"].get("labels", {}))]
        names = [{port["name"] for port in one["spec"]["ports"]} for one in found]
        endpoints = it["spec"]["endpoints"]
    else:
        found = tree.pods(labels)
        names = [set(tree.ports(one)) for one in found]
        endpoints = it["spec"]["podMetricsEndpoints"]
    if len(found) != 1:
        tree.wrong(it, f"it selects {len(found)} things, not one")
    certificates = {one["spec"]["secretName"]: one["spec"] for one in tree.of("Certificate")}
    for endpoint in endpoints:
        if not any(endpoint["port"] in there for there in names):
            tree.wrong(it, f"there is no port {endpoint['port']}")
        for reference in (endpoint["tlsConfig"]["ca"]["secret"], endpoint["authorization"]["credentials"]):
            keys = tree.keys_of("Secret", reference["name"])
            if keys is None or reference["key"] not in keys:
                tree.wrong(it, f"there is no key {reference['key']} in a secret {reference['name']}")
        signed = certificates.get(endpoint["tlsConfig"]["ca"]["secret"]["name"])
        server = endpoint["tlsConfig"]["serverName"]
        if signed is not None and server not in signed.get("dnsNames", []):
            tree.wrong(it, f"serverName {server} is not in the certificate")
        given = {rule["targetLabel"]: rule.get("replacement") for rule in endpoint.get("relabelings", [])}
        if given.get("job") not in ("looptrain-coordinator", "looptrain-worker"):
            tree.wrong(it, f"the rules know no job {given.get('job')}")
        if given.get("run") != run_of(tree):
            tree.wrong(it, f"the label run is {given.get('run')}, the run is {run_of(tree)}")


def run_of(tree):
    """The name in the spec that the coordinator gets."""
    for it in tree.of("ConfigMap"):
        if "run.toml" in it["data"]:
            return tomllib.loads(it["data"]["run.toml"])["run"]["name"]
    return None


def certificate(tree, it):
    spec = it["spec"]
    issuers = {one["metadata"]["name"] for one in tree.of("Issuer")}
    if spec["issuerRef"]["name"] not in issuers:
        tree.wrong(it, f"there is no issuer {spec['issuerRef']['name']}")
    if spec.get("isCA"):
        return
    uris = [uri for uri in spec.get("uris", []) if uri.startswith("spiffe://looptrain/")]
    found = IDENTITY.match(uris[0]) if len(uris) == 1 else None
    if found is None:
        tree.wrong(it, "it must have one URI spiffe://looptrain/ROLE/NAME")
        return
    role = found[1]
    if spec["secretName"] != f"looptrain-{role}-tls":
        tree.wrong(it, f"a certificate of role {role} belongs into looptrain-{role}-tls")
    # Of every role: `--tls` looks whether the own certificate is good for both ends.
    if not {"client auth", "server auth"} <= set(spec.get("usages", [])):
        tree.wrong(it, "its usages must be client auth and server auth")


def issuer(tree, it):
    wanted = it["spec"].get("ca", {}).get("secretName")
    made = {one["spec"]["secretName"] for one in tree.of("Certificate") if one["spec"].get("isCA")}
    if wanted is not None and wanted not in made:
        tree.wrong(it, f"no authority is made into {wanted}")


CHECKS = {
    "Deployment": workload,
    "StatefulSet": workload,
    "Service": service,
    "PodDisruptionBudget": budget,
    "NetworkPolicy": policy,
    "ServiceMonitor": monitor,
    "PodMonitor": monitor,
    "Certificate": certificate,
    "Issuer": issuer,
}
# Nothing of these points to anything.
ALONE = {"Namespace", "ConfigMap", "Secret"}


def check(ops):
    """Troubles, and what was left out."""
    try:
        trees, _ = rendered(ops)
    except ImportError:
        return [], []
    troubles = []
    templates = secrets(ops)
    for path, it in templates.items():
        for key, value in it["stringData"].items():
            secret = any(word in key.lower() for word in ("key", "secret", "token", "prometheus"))
            if secret and not all(line.startswith("REPLACE-") for line in value.splitlines()):
                troubles.append(f"{path.relative_to(ops)}: {key} is no placeholder")
    for name, objects in trees.items():
        tree = Tree(name, objects, list(templates.values()))
        namespaces = {it["metadata"]["name"] for it in tree.of("Namespace")}
        for it in objects:
            if it["kind"] not in CHECKS and it["kind"] not in ALONE:
                tree.wrong(it, "this check does not know the kind")
            if it["kind"] != "Namespace" and it["metadata"].get("namespace") not in namespaces:
                tree.wrong(it, "its namespace is not made here")
            if it["kind"] == "Secret":
                tree.wrong(it, "a secret does not belong among manifests")
            CHECKS.get(it["kind"], lambda *_: None)(tree, it)
        everything = [it for it in tree.of("NetworkPolicy") if it["spec"]["podSelector"] == {}]
        if not any(set(it["spec"]["policyTypes"]) == {"Ingress", "Egress"} and not it["spec"].get("ingress")
                   and not it["spec"].get("egress") for it in everything):
            troubles.append(f"kubernetes, {name}: no policy denies what no other one allows")
        troubles += tree.troubles
    return troubles, []
