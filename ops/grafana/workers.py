"""Who computes what, and who is slow."""

from grafana_foundation_sdk.models import common as kinds

from pages import of_a_run, page
from panels import graph, mapping, number, rows_of, states
from queries import ALL, CAUSES, Target, counts, of, quantile, total

DURATION = "looptrain_worker_section_duration_seconds"
SECTIONS = {
    "compute": "Forward and backward of its slots. Slots follow speed, so that ranks should be level here; "
    "one that is far above the others has too few slots to give away, or has just become slow.",
    "data_wait": "Waiting for tokens. It should be near 0: the feed reads ahead. If it is not, see the feed on the "
    "storage dashboard.",
    "reduce": "The all-reduce, with the wait for ranks that come late: the slowest rank in compute has the shortest.",
    "send": "The part of reduce in which the connection to the next rank took no more. High on one rank alone: "
    "its link, or a next rank that is late.",
    "optimizer": "Clipping and the update of the previous step. It should be the same on machines of one kind.",
}
# In what a member can straggle, and the colours of that.
STRAGGLES = {"data": "blue", "compute": "red", "reduce": "orange", "commit": "purple"}
# What holds the clocks of a GPU down, the most serious last, and the colours of that.
THROTTLES = {"power": "blue", "thermal": "orange", "hardware": "red"}
# Of GPUs the workers tell, while the variables of this dashboard choose a run and its coordinators.
EVERY_GPU = "Of all workers that are scraped, whatever is chosen above. Machines without a GPU have no line."


def section(name):
    """What members took in a section of their newest step."""
    return of(DURATION, f'section="{name}"')


def straggles():
    """The number of the section that each member straggles in, in the order of STRAGGLES; 0 for none."""
    labels = [f'section="{name}"' for name in STRAGGLES]
    members = [of("looptrain_worker_slots"), *(of("looptrain_worker_straggles", label) for label in labels)]
    parts = [f"{at} * max by (rank, worker) ({series})" for at, series in enumerate(members)]
    return " or ".join(reversed(parts))


def now():
    """Each member as it is."""
    columns = [
        ("slots", "none", f"sum by (worker, rank) ({of('looptrain_worker_slots')})"),
        ("slots/s", "none", f"sum by (worker, rank) ({of('looptrain_worker_slot_rate_per_second')})"),
        *((name, "s", f"sum by (worker, rank) ({section(name)})") for name in SECTIONS),
    ]
    return [
        rows_of(
            "Members",
            "Each member of the generation: its slots, how fast it computes them, and where the time of its newest "
            "step went. A row that stands out in one column is the machine to look at.",
            columns,
            16,
            9,
            alerts=["LooptrainStraggler"],
        ),
        rows_of(
            "Slowest in each section",
            "The rank with the longest time in its newest step. In reduce and send that may be one that waits for "
            "others.",
            [("seconds", "s", f"topk by (section) (1, sum by (section, rank, worker) ({of(DURATION)}))")],
            8,
            9,
            alerts=["LooptrainStraggler"],
            by=("section", "rank", "worker"),
        ),
    ]


def per_rank():
    """The sections of a step, a line for each rank."""
    straggling = states(
        "Straggles in",
        "The section of a step in which a member takes much longer than the others, as the coordinator judges by "
        "medians over its latest steps. Reduce is the link to the next rank, commit the update of a step.",
        [Target(straggles(), "{{rank}} {{worker}}")],
        mapping({"no": "green", **STRAGGLES}),
        width=24,
        height=7,
        alerts=["LooptrainStraggler"],
    )
    sections = [
        graph(
            f"Section: {name}",
            text,
            [Target(f"sum by (rank, worker) ({section(name)})", "{{rank}} {{worker}}")],
            width=8,
            unit="s",
            bounds=(0, None),
            alerts=["LooptrainStraggler"],
        )
        for name, text in SECTIONS.items()
    ]
    cost = graph(
        "What the slowest rank costs",
        "Per section, the slowest rank's time less the mean of all: what a step would save if all were alike. "
        "The slowest of each section may be another one.",
        [
            Target(
                f"max by (section) ({of(DURATION)}) - avg by (section) ({of(DURATION)})", "{{section}}"
            )
        ],
        width=8,
        unit="s",
        bounds=(0, None),
        alerts=["LooptrainStraggler"],
    )
    return [straggling, *sections, cost]


def slots():
    """How the work is shared out."""
    return [
        graph(
            "Slots",
            "Slots of each member in the step in flight. They follow measured speed: a machine of half the speed has "
            "half of them.",
            [Target(f"sum by (rank, worker) ({of('looptrain_worker_slots')})", "{{rank}} {{worker}}")],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            stacked=kinds.StackingMode.NORMAL,
        ),
        graph(
            "Slot rate",
            "Slots that each member computes in a second, a median over its latest steps. Machines of one kind should "
            "be level; one that falls is throttled, shared with something else, or broken.",
            [
                Target(
                    f"sum by (rank, worker) ({of('looptrain_worker_slot_rate_per_second')})", "{{rank}} {{worker}}"
                )
            ],
            width=8,
            unit="none",
            bounds=(0, None),
            alerts=["LooptrainStraggler"],
        ),
        graph(
            "Slowest rank over steps",
            "The slowest rank of each section, the p99 over steps: single slow steps are seen here that a sample of "
            "the newest step misses.",
            [Target(quantile(0.99, "looptrain_section_duration_seconds", by="section"), "{{section}}")],
            width=8,
            unit="s",
            bounds=(0, None),
        ),
    ]


def coming():
    """Who comes and who goes."""
    return [
        number(
            "Workers",
            "Members of the current generation.",
            [Target(f"max({of('looptrain_world')})")],
            width=4,
            height=8,
            decimals=0,
            alerts=["LooptrainWorldShrank"],
        ),
        graph(
            "Joined and refused",
            "Since this coordinator started. Refused ones computed other bits or have another release: the "
            "coordinator's log says why.",
            [
                Target(total("looptrain_workers_joined_total"), "joined"),
                Target(total("looptrain_workers_refused_total"), "refused"),
            ],
            width=10,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainWorkersFlapping"],
        ),
        graph(
            "Lost, by cause",
            "Since this coordinator started. Many that died or fell silent: machines that are taken away, out of "
            "memory, or a network that breaks.",
            counts("looptrain_workers_lost_total", "cause", CAUSES),
            width=10,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainWorkersFlapping", "LooptrainWorldShrank"],
        ),
    ]


def trouble():
    """Who is slow, and what had to be done again."""
    return [
        graph(
            "Times that a worker began to straggle",
            "Since this coordinator started, by section. The log names the worker and what it costs a step.",
            counts("looptrain_stragglers_total", "section", STRAGGLES),
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainStraggler"],
        ),
        graph(
            "Divergences",
            "Times that ranks disagreed on a gradient or on weights, since this coordinator started. The rank that "
            "is alone with its bits is dropped; look at its machine.",
            [Target(total("looptrain_divergences_total"), "divergences")],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            thresholds=("green", 1, "red"),
            alerts=["LooptrainRanksDiverge"],
        ),
        graph(
            "Steps that were tried again",
            "Since this coordinator started. Each loss of a member while a step is in flight costs one.",
            [
                Target(total("looptrain_steps_retried_total"), "retried"),
                Target(total("looptrain_generations_total"), "generations"),
            ],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainWorkersFlapping"],
        ),
    ]


def access():
    """Who is turned away, and when certificates end."""
    return [
        graph(
            "Connections turned away",
            "By port and reason, in a minute. Certificate and role: a process with the wrong credentials, or somebody "
            "who tries. Stranger, silent and crowded: a scanner, a health check that speaks another language, or an "
            "attack; training goes on. The process's log names the newest address.",
            [
                Target(
                    f"sum by (port, reason) (rate({of('looptrain_connections_refused_total', scope=ALL)}"
                    "[$__rate_interval])) * 60",
                    "{{port}}, {{reason}}",
                )
            ],
            width=12,
            unit="none",
            bounds=(0, None),
            alerts=["LooptrainConnectionsRefused"],
        ),
        graph(
            "Time until certificates end",
            "Of each process that shows one. A renewed one counts within seconds of being written; nothing is "
            "restarted for it.",
            [Target(f"{of('looptrain_tls_certificate_expiry_seconds', scope=ALL)} - time()", "{{instance}}")],
            width=12,
            unit="s",
            alerts=["LooptrainCertificateEnds"],
        ),
    ]


def throttled():
    """The number of what holds each GPU's clocks down, in the order of THROTTLES; 0 for nothing."""
    parts = [
        f'{at} * looptrain_gpu_throttled{{reason="{name}"}}' for at, name in enumerate(THROTTLES, start=1)
    ]
    return f"max by (instance, gpu) ({' or '.join(parts)})"


def gpus():
    """The devices, as NVML sees them."""
    device = "{{instance}} {{gpu}}"
    return [
        graph(
            "GPU temperature",
            f"Of the chip. One that is well above the others: look at its fans, its air or its coolant. {EVERY_GPU}",
            [Target("looptrain_gpu_temperature_celsius", device)],
            width=6,
            unit="celsius",
            alerts=["LooptrainGpuThrottled"],
        ),
        graph(
            "GPU power",
            "What it draws. Level and near its limit while it computes is as it should be; one that draws much less "
            f"than the others waits, or is throttled. {EVERY_GPU}",
            [Target("looptrain_gpu_power_watts", device)],
            width=6,
            unit="watt",
            bounds=(0, None),
            alerts=["LooptrainGpuThrottled"],
        ),
        graph(
            "GPU utilization",
            "The share of time in which a kernel ran, however small: high does not yet mean fast. Low: the sections "
            f"of a step, above, say what the worker waits for. {EVERY_GPU}",
            [Target("looptrain_gpu_utilization_ratio", device)],
            width=6,
            unit="percentunit",
            bounds=(0, 1),
        ),
        graph(
            "GPU memory used, of its size",
            "By all processes on it, and its size. Near its size the next allocation may fail: have more "
            f"computed again (compute.recompute), or see who else is on the GPU. {EVERY_GPU}",
            [
                Target("looptrain_gpu_memory_used_bytes", f"used, {device}"),
                Target("looptrain_gpu_memory_size_bytes", f"size, {device}"),
            ],
            width=6,
            unit="bytes",
            bounds=(0, None),
        ),
        graph(
            "GPU ECC errors, by severity",
            "Bits of its memory that flipped, since the driver was loaded. Corrected ones harm nothing; a GPU with "
            "many more than the others is worth a test before its next run. Uncorrected ones that rise: drain that "
            f"worker, and reset or replace the GPU. {EVERY_GPU} Nor has a GPU without ECC.",
            [Target("looptrain_gpu_ecc_errors_total", f"{{{{severity}}}}, {device}")],
            width=12,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainGpuEccErrors"],
        ),
        states(
            "GPU throttled",
            "What holds its clocks down; of several the most serious. Power is its limit, usual under full load. "
            "Thermal: cool it. Hardware: look at its power supply and cooling, then have the machine looked at. "
            f"{EVERY_GPU}",
            [Target(throttled(), device)],
            mapping({"no": "green", **THROTTLES}),
            width=12,
            height=8,
            alerts=["LooptrainGpuThrottled"],
        ),
    ]


def board():
    return page(
        "workers",
        "Who computes what, who is slow, who comes and goes.",
        of_a_run(),
        [
            ("Now", now()),
            ("Sections of a step, by rank", per_rank()),
            ("Slots", slots()),
            ("Coming and going", coming()),
            ("Trouble", trouble()),
            ("Access", access()),
            ("GPUs", gpus()),
        ],
    )
