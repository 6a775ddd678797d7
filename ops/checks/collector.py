"""The OpenTelemetry Collector's configuration: what its pipelines name is there, and nothing is there for nothing."""

PARTS = ("receivers", "processors", "exporters")


def check(ops):
    """Troubles, and what was left out."""
    try:
        import yaml
    except ImportError:
        return [], ["the collector's configuration, for PyYAML is not installed"]
    place = "otel/collector.yaml"
    text = (ops / place).read_text()
    said = yaml.safe_load(text)
    troubles = []
    service = said["service"]
    pipelines = service["pipelines"]
    # What the program sends.
    if set(pipelines) != {"traces", "metrics", "logs"}:
        troubles.append(f"{place}: its pipelines are {sorted(pipelines)}, and not traces, metrics and logs")
    for part in PARTS:
        used = {name for pipeline in pipelines.values() for name in pipeline.get(part, [])}
        there = set(said.get(part) or {})
        troubles += [f"{place}: {part} has no {name}" for name in sorted(used - there)]
        troubles += [f"{place}: no pipeline uses {name} of {part}" for name in sorted(there - used)]
    extensions = set(said.get("extensions") or {})
    if extensions != set(service.get("extensions", [])):
        troubles.append(f"{place}: extensions that are there and those that are used differ")
    for name, pipeline in pipelines.items():
        processors = pipeline.get("processors", [])
        if processors[:1] != ["memory_limiter"] or processors[-1:] != ["batch"]:
            troubles.append(f"{place}: {name}: memory_limiter comes first and batch last")
        if "otlp" not in pipeline["receivers"]:
            troubles.append(f"{place}: {name} does not come over OTLP")
    if not said["receivers"]["otlp"]["protocols"].get("grpc"):
        troubles.append(f"{place}: gRPC is all that the program speaks")
    for name, exporter in said["exporters"].items():
        line = next((line for line in text.splitlines() if exporter["endpoint"] in line), "")
        if "REPLACE" not in line:
            troubles.append(f"{place}: the endpoint of {name} is not marked as one to replace")
    return troubles, []
