"""The object store as coordinator and workers see it."""

from grafana_foundation_sdk.models import common as kinds

from pages import of_processes, page
from panels import bars, graph, number
from queries import ALL, Target, mean, of, quantile, total


def calls():
    """What calls to the store come to."""
    operations = of("looptrain_store_operations_total", scope=ALL)
    failed = of("looptrain_store_operations_total", 'outcome="failed"', scope=ALL)
    retries = of("looptrain_store_retries_total", scope=ALL)
    latency = "looptrain_store_operation_duration_seconds"
    return [
        graph(
            "Operations per second",
            "Calls to the object store that are over, by operation, of all chosen processes.",
            [Target(f"sum by (operation) (rate({operations}[$__rate_interval]))", "{{operation}}")],
            width=8,
            unit="ops",
            bounds=(0, None),
        ),
        graph(
            "Failures",
            "Calls that no attempt could do, since the processes started. A start ends with one; a save is tried "
            "again; a worker that cannot read its data leaves.",
            [Target(f"sum by (operation) ({failed})", "{{operation}}")],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainStoreFailures"],
        ),
        graph(
            "Retries for each call",
            "Attempts after one that failed, per call, over five minutes. Some are usual with a busy store (503, 429); "
            "from a tenth on the store is the bottleneck, or ill.",
            [
                Target(
                    f"sum by (operation) (rate({retries}[5m])) / sum by (operation) (rate({operations}[5m]))",
                    "{{operation}}",
                )
            ],
            width=8,
            unit="percentunit",
            bounds=(0, None),
            thresholds=("green", 0.1, "red"),
            alerts=["LooptrainStoreRetries"],
        ),
        graph(
            "Latency, median",
            "Of a call with all its attempts and pauses, over five minutes.",
            [Target(quantile(0.5, latency, ALL, "operation", "5m"), "{{operation}}")],
            width=8,
            unit="s",
            log=True,
        ),
        graph(
            "Latency, p99",
            "Of a call with all its attempts and pauses, over five minutes. Reads that are slow get a second one "
            "beside them; writes that are slow make checkpoints late.",
            [Target(quantile(0.99, latency, ALL, "operation", "5m"), "{{operation}}")],
            width=8,
            unit="s",
            log=True,
            alerts=["LooptrainStoreRetries"],
        ),
        graph(
            "Time in calls, by process",
            "Seconds in calls to the store a second: how many calls a process has in flight. One process that stands "
            "out has a slow way to the store.",
            [
                Target(
                    f"sum by (job, instance) (rate({of(f'{latency}_sum', scope=ALL)}[$__rate_interval]))",
                    "{{job}} {{instance}}",
                )
            ],
            width=8,
            unit="none",
            bounds=(0, None),
        ),
    ]


def checkpoints():
    """The newest checkpoint, and how saves go."""
    step, saved = of("looptrain_step", scope=ALL), of("looptrain_checkpoint_step", scope=ALL)
    age = of("looptrain_checkpoint_age_seconds", scope=ALL)
    duration, stall = "looptrain_checkpoint_duration_seconds", "looptrain_checkpoint_stall_seconds"
    return [
        number(
            "Steps without a checkpoint",
            "Committed steps that would be done again if all machines went at once.",
            [Target(f"max({step}) - max({saved})")],
            decimals=0,
            alerts=["LooptrainCheckpointTooOld"],
        ),
        number(
            "Newest checkpoint",
            "Its step. `looptrain checkpoint list` shows all of them, `looptrain checkpoint verify` reads one back.",
            [Target(f"max({saved})")],
            decimals=0,
        ),
        number(
            "Size",
            "All parts of the newest checkpoint.",
            [Target(f"max({of('looptrain_checkpoint_size_bytes', scope=ALL)})")],
            unit="bytes",
        ),
        number(
            "Age",
            "Since the newest checkpoint was written; before the first one, since the coordinator's start.",
            [Target(f"min({age})")],
            unit="s",
            decimals=0,
            thresholds=("green", 1800, "orange", 3600, "red"),
            alerts=["LooptrainCheckpointTooOld"],
        ),
        number(
            "Mean stall",
            "How long a member stands still to copy its state for a checkpoint: all that a step waits for.",
            [Target(mean(stall, scope=ALL, window=""))],
            unit="s",
            thresholds=("green", 1, "orange", 5, "red"),
        ),
        number(
            "Failed and delayed",
            "Saves that were given up, and that were due while another one was being written, since the coordinator "
            "started.",
            [
                Target(total("looptrain_checkpoint_failures_total", scope=ALL), "failed"),
                Target(total("looptrain_checkpoint_delays_total", scope=ALL), "delayed"),
            ],
            decimals=0,
            thresholds=("green", 1, "orange"),
            alerts=["LooptrainCheckpointSavesFail"],
        ),
        graph(
            "Age of the checkpoint",
            "A saw whose teeth are checkpoint.every_steps long. It has to fall again before it is an hour.",
            [Target(f"min by (instance) ({age})", "{{instance}}")],
            width=6,
            unit="s",
            bounds=(0, None),
            thresholds=("green", 3600, "red"),
            alerts=["LooptrainCheckpointTooOld"],
        ),
        graph(
            "Duration of saves",
            "From the directive to the manifest, over all saves of the coordinator. The bounds of buckets make it "
            "coarse. If it comes near the time between two checkpoints, raise checkpoint.every_steps.",
            [
                Target(quantile(share, duration, ALL, window=""), name)
                for share, name in ((0.5, "p50"), (0.99, "p99"))
            ],
            width=6,
            unit="s",
            bounds=(0, None),
            alerts=["LooptrainCheckpointSavesFail", "LooptrainCheckpointTooOld"],
        ),
        graph(
            "Stall of a member",
            "Over all saves of the coordinator: how long members stood still to copy their state.",
            [
                Target(quantile(share, stall, ALL, window=""), name)
                for share, name in ((0.5, "p50"), (0.99, "p99"))
            ],
            width=6,
            unit="s",
            bounds=(0, None),
        ),
        graph(
            "Size of checkpoints",
            "It changes when the model does, and not otherwise.",
            [Target(f"max({of('looptrain_checkpoint_size_bytes', scope=ALL)})", "size")],
            width=6,
            unit="bytes",
            bounds=(0, None),
        ),
    ]


def feed():
    """Where tokens come from."""
    blocks = of("looptrain_feed_blocks_total", scope=ALL)
    fed = f"sum({blocks})"
    return [
        graph(
            "Blocks of datasets, by source",
            "Where the blocks that workers want come from: memory, the disk of the machine, or the store.",
            [Target(f"sum by (source) (rate({blocks}[$__rate_interval]))", "{{source}}")],
            width=6,
            unit="ops",
            bounds=(0, None),
            stacked=kinds.StackingMode.NORMAL,
        ),
        bars(
            "Share of each source",
            "Since the workers started. Much from the store with a dataset that should fit on the disk: give workers "
            "a larger cache (--cache, --cache-gib).",
            [Target(f"sum by (source) ({blocks}) / scalar({fed})", "{{source}}", instant=True)],
            width=4,
            unit="percentunit",
            bounds=(0, 1),
        ),
        graph(
            "From the store",
            "Bytes of datasets that workers read from the store in a second.",
            [
                Target(
                    f"sum(rate({of('looptrain_feed_store_size_bytes_total', scope=ALL)}[$__rate_interval]))", "read"
                )
            ],
            width=5,
            unit="Bps",
            bounds=(0, None),
        ),
        graph(
            "Hedged reads, by winner",
            "Slow reads that got a second one beside them, since the workers started, by which was done first. Many "
            "won by the second: the store has slow spots. Many won by the first: it is slow as a whole.",
            [
                Target(
                    f"sum by (winner) ({of('looptrain_feed_hedged_total', scope=ALL)})", "{{winner}}"
                )
            ],
            width=5,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
        ),
        graph(
            "Damaged blocks",
            "Blocks that were not what was written and were read again, since the workers started. They harm "
            "nothing, but a disk or a network does. One machine alone: replace its disk, or empty its cache.",
            [
                Target(
                    f"sum by (instance) ({of('looptrain_feed_damaged_total', scope=ALL)})", "{{instance}}"
                )
            ],
            width=4,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
        ),
    ]


def telemetry():
    """What of all this does not get out."""
    return [
        graph(
            "Telemetry that was dropped",
            "Spans and log records that did not fit into the queue of the exporter, or that nobody took, since the "
            "processes started. Training does not suffer, but what is seen of it does.",
            [
                Target(
                    f"sum by (job, signal) ({of('looptrain_telemetry_dropped_total', scope=ALL)})",
                    "{{signal}}, {{job}}",
                )
            ],
            width=24,
            height=6,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainTelemetryDropped"],
        )
    ]


def board():
    return page(
        "storage",
        "The object store as coordinator and workers see it: calls, checkpoints, and the feed of tokens.",
        of_processes(),
        [("Calls", calls()), ("Checkpoints", checkpoints()), ("Feed", feed()), ("Telemetry", telemetry())],
    )
