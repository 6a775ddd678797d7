"""A run at a glance."""

from grafana_foundation_sdk.models import common as kinds

from pages import of_a_run, page
from panels import bars, graph, mapping, number, states
from queries import CAUSES, Target, counts, mean, of, quantile, total

# The phases and their colours.
PHASES = {
    "waiting": "orange",
    "forming": "yellow",
    "training": "green",
    "evaluating": "blue",
    "paused": "purple",
    "finishing": "light-green",
    "finished": "dark-green",
    "failed": "red",
}


def phase():
    """The phase as a number, in the order of PHASES."""
    labels = [f'phase="{name}"' for name in PHASES]
    return " + ".join(f"{at} * max({of('looptrain_run_phase', label)})" for at, label in enumerate(labels))


def now():
    """Where the run stands."""
    return [
        number(
            "Phase",
            "What the run is doing. `looptrain status` says why. Waiting: too few workers. Failed: the log's last "
            "lines say what went wrong.",
            [Target(phase(), "phase")],
            alerts=["LooptrainCoordinatorDown", "LooptrainWaitingForWorkers"],
            mappings=mapping(PHASES),
        ),
        number(
            "Step",
            "The newest committed step, of how many.",
            [Target(f"max({of('looptrain_step')})", "committed"), Target(f"max({of('looptrain_run_steps')})", "of")],
            decimals=0,
        ),
        number(
            "Progress",
            "Share of the run's steps that are committed.",
            [Target(f"max({of('looptrain_step')}) / max({of('looptrain_run_steps')})")],
            unit="percentunit",
            bounds=(0, 1),
            decimals=1,
        ),
        number(
            "Time left",
            "Steps that are left, at the pace of the chosen time range.",
            [
                Target(
                    f"(max({of('looptrain_run_steps')}) - max({of('looptrain_step')}))"
                    f" / sum(rate({of('looptrain_steps_total')}[$__range]))"
                )
            ],
            unit="s",
            decimals=0,
        ),
        number(
            "Since the last commit",
            "A run that trains commits every few seconds or minutes. It grows while the run is paused, waits, or "
            "forms a generation; if the phase says training and it grows, something is stuck.",
            [Target(f"min({of('looptrain_commit_age_seconds')})")],
            unit="s",
            decimals=0,
            thresholds=("green", 120, "orange", 600, "red"),
            alerts=["LooptrainNoCommit"],
        ),
        number(
            "Since the last checkpoint",
            "What is lost at most if all machines go at once. See the storage dashboard for why it is old.",
            [Target(f"min({of('looptrain_checkpoint_age_seconds')})")],
            unit="s",
            decimals=0,
            thresholds=("green", 1800, "orange", 3600, "red"),
            alerts=["LooptrainCheckpointTooOld"],
        ),
    ]


def training():
    """Losses, pace, and where a step's time goes."""
    return [
        graph(
            "Loss",
            "The Stage I loss that is trained by, and the cross-entropy after each loop, nats per token. All should "
            "fall; later loops should be below earlier ones. A spike that comes back within minutes is common.",
            [
                Target(f"max({of('looptrain_loss')})", "trained loss"),
                Target(f"max by (loop) ({of('looptrain_loop_loss')})", "loop {{loop}}"),
            ],
            unit="none",
            decimals=4,
            alerts=["LooptrainLossSpike", "LooptrainLoopLossRising"],
        ),
        graph(
            "Tokens per second",
            "Tokens of committed steps, and of the run so far on the right. It follows the number of workers; if it "
            "fell and they did not, see where the step's time goes.",
            [
                Target(f"sum(rate({of('looptrain_tokens_total')}[$__rate_interval]))", "tokens/s"),
                Target(f"max({of('looptrain_run_tokens')})", "tokens so far"),
            ],
            bounds=(0, None),
            right=[("tokens so far", "short")],
        ),
        graph(
            "Model FLOPs utilization",
            "Share of what the workers' devices could do at most (cluster.peak_tflops of the spec; without it there "
            "is no line), and operations per second, all loops counted.",
            [
                Target(f"max({of('looptrain_mfu_ratio')})", "MFU"),
                Target(f"max({of('looptrain_compute_rate_per_second')})", "operations"),
            ],
            unit="percentunit",
            bounds=(0, None),
            right=[("operations", "flops")],
        ),
        graph(
            "Step duration",
            "From a step's plan to its commit. A p99 far above the median: single steps that were stuck, most often "
            "in the all-reduce or for data.",
            [
                Target(quantile(share, "looptrain_step_duration_seconds"), name)
                for share, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
            ],
            unit="s",
            bounds=(0, None),
        ),
        graph(
            "Where a step's time goes",
            "The slowest rank in each section, the mean over steps. Compute should be most of it. Sections of "
            "different ranks overlap, so that the sum may be more than a step.",
            [Target(mean("looptrain_section_duration_seconds", "section"), "{{section}}")],
            unit="s",
            bounds=(0, None),
        ),
        graph(
            "Gradient norm and learning rate",
            "The norm before clipping: one that grows for long comes before a loss that diverges. The learning rate "
            "on the right.",
            [
                Target(f"max({of('looptrain_gradient_norm_ratio')})", "gradient norm"),
                Target(f"max({of('looptrain_learning_rate_ratio')})", "learning rate"),
            ],
            unit="none",
            alerts=["LooptrainLossSpike"],
            right=[("learning rate", "sci")],
        ),
    ]


def goodput():
    """What becomes of the workers' time."""
    productive = of("looptrain_goodput_time_seconds_total", 'category="productive"')
    members_time = of("looptrain_goodput_time_seconds_total", 'category!="idle"')
    all_time = of("looptrain_goodput_time_seconds_total")
    return [
        number(
            "Goodput",
            "Share of the workers' time since the run began that went into steps for the first time. Spares and "
            "pauses count here, as idle time. They do not in the goodput of the members, which the alert watches.",
            [Target(f"max({of('looptrain_goodput_ratio')})")],
            unit="percentunit",
            decimals=1,
            height=8,
            bounds=(0, 1),
            thresholds=("red", 0.7, "orange", 0.9, "green"),
            alerts=["LooptrainGoodputLow"],
        ),
        graph(
            "Goodput now",
            "Productive share of the last five minutes. It dips when workers die or join. Spares and pauses do not "
            "count in the goodput of the members; the alert watches that, over 30 minutes, for less than 70 %.",
            [
                Target(f"sum(rate({productive}[5m])) / sum(rate({members_time}[5m]))", "of the members"),
                Target(f"sum(rate({productive}[5m])) / sum(rate({all_time}[5m]))", "of all workers"),
            ],
            width=8,
            unit="percentunit",
            bounds=(0, 1),
            thresholds=("red", 0.7, "green"),
            alerts=["LooptrainGoodputLow"],
        ),
        graph(
            "Workers by what they do",
            "Worker-seconds a second, by what became of them: the sum is the number of workers.",
            [Target(f"sum by (category) (rate({all_time}[$__rate_interval]))", "{{category}}")],
            width=7,
            unit="short",
            bounds=(0, None),
            stacked=kinds.StackingMode.NORMAL,
            alerts=["LooptrainGoodputLow"],
        ),
        bars(
            "Time since the run began",
            "Worker-seconds by category, over all coordinators of the run. The largest beside productive is what "
            "to work on first.",
            [
                Target(
                    f"sort_desc(max by (category) ({of('looptrain_run_time_seconds')}))", "{{category}}", instant=True
                )
            ],
            width=5,
            unit="s",
        ),
    ]


def members():
    """Who trains, since when, and what went wrong."""
    return [
        number(
            "Workers",
            "Members of the current generation. Warm spares do not count.",
            [Target(f"max({of('looptrain_world')})")],
            decimals=0,
            alerts=["LooptrainWorldShrank"],
        ),
        number(
            "Generation",
            "It grows each time the ring is formed anew.",
            [Target(f"max({of('looptrain_generation')})")],
            decimals=0,
        ),
        states(
            "Phases",
            "What the run did when.",
            [Target(phase(), "phase")],
            mapping(PHASES),
            width=16,
            height=4,
            alerts=["LooptrainNoCommit", "LooptrainWaitingForWorkers"],
        ),
        graph(
            "Workers and generation",
            "Members of the generation, and its number on the right.",
            [
                Target(f"max({of('looptrain_world')})", "workers"),
                Target(f"max({of('looptrain_generation')})", "generation"),
            ],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainWorldShrank", "LooptrainWorkersFlapping"],
            right=[("generation", "none")],
        ),
        graph(
            "Workers lost, by cause",
            "Since this coordinator started. Died: the connection broke. Silent: no heartbeat within "
            "cluster.worker_timeout. Left: told to, or on its own. Expelled: for a fault of its own.",
            counts("looptrain_workers_lost_total", "cause", CAUSES),
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainWorkersFlapping"],
        ),
        graph(
            "Trouble with steps",
            "Since this coordinator started. Retried: the generation ended before the commit, which costs a step. "
            "Skipped: a loss or gradient that was no number. Rewinds: back to a checkpoint. Divergences: ranks "
            "did not agree on bits; one is too many.",
            [
                Target(total("looptrain_steps_retried_total"), "steps retried"),
                Target(total("looptrain_steps_skipped_total"), "steps skipped"),
                Target(total("looptrain_rewinds_total"), "rewinds"),
                Target(total("looptrain_divergences_total"), "divergences"),
            ],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainStepsSkipped", "LooptrainRewind", "LooptrainRanksDiverge"],
        ),
    ]


def checkpoints():
    """How old, how long, how often in vain."""
    return [
        graph(
            "Age of commit and checkpoint",
            "The checkpoint's age is a saw whose teeth are checkpoint.every_steps long. A tooth that goes on "
            "growing is a save that fails or takes too long.",
            [
                Target(f"min({of('looptrain_checkpoint_age_seconds')})", "checkpoint"),
                Target(f"min({of('looptrain_commit_age_seconds')})", "commit"),
            ],
            unit="s",
            bounds=(0, None),
            alerts=["LooptrainCheckpointTooOld", "LooptrainNoCommit"],
        ),
        graph(
            "Duration of saves",
            "From the directive to the manifest, over all saves of this coordinator. Training goes on meanwhile; "
            "it must be shorter than the time between two checkpoints.",
            [
                Target(quantile(0.5, "looptrain_checkpoint_duration_seconds", window=""), "p50"),
                Target(quantile(1, "looptrain_checkpoint_duration_seconds", window=""), "longest, at most"),
            ],
            width=6,
            unit="s",
            bounds=(0, None),
            alerts=["LooptrainCheckpointTooOld"],
        ),
        graph(
            "Saves that failed or had to wait",
            "Since this coordinator started. Failed ones are tried again; delayed ones were due while another one "
            "was being written.",
            [
                Target(total("looptrain_checkpoint_failures_total"), "failed"),
                Target(total("looptrain_checkpoint_delays_total"), "delayed"),
            ],
            width=6,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainCheckpointSavesFail"],
        ),
    ]


def board():
    return page(
        "run",
        "A run at a glance: where it stands, how fast it is, and what becomes of the workers' time.",
        of_a_run(),
        [
            ("Now", now()),
            ("Training", training()),
            ("Goodput", goodput()),
            ("Workers", members()),
            ("Checkpoints", checkpoints()),
        ],
    )
