#!/usr/bin/env python3
"""Writes the Grafana dashboards that lie beside it: run, workers, storage, looplm.

    pip install grafana-foundation-sdk==0.0.21
    python3 ops/grafana/build.py            # writes the four files
    python3 ops/grafana/build.py --check    # exit status 1 when one is not what this would write

Queries name metrics as docs/metrics.md does. A counter may have no series for what has never happened; `zero`
makes a 0 of that, but only while the process that would count it is scraped, so that a coordinator that
is gone does not look like one without trouble. Each panel whose numbers an alert watches links to the
alert's section in docs/runbooks.md; where that can be read is the dashboards' variable `repository`.
"""

import argparse
import json
import pathlib
import sys

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus
from grafana_foundation_sdk.builders import stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

HERE = pathlib.Path(__file__).parent
REPOSITORY = "https://example.org/looptrain"
DASHBOARDS = {"run": "Run", "workers": "Workers", "storage": "Storage", "looplm": "LoopLM"}
SOURCE = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")

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
CAUSES = ["died", "silent", "left", "expelled"]
OPERATIONS = "operation"

# The process that counts, for matchers: the coordinators of the run, or what is chosen of all processes.
RUN = 'instance=~"$instance"'
ALL = 'job=~"$job",instance=~"$instance"'


def of(metric, labels="", scope=RUN):
    """A selector of a metric's series."""
    return f"{metric}{{{','.join(part for part in (scope, labels) if part)}}}"


def zero(expression, by=""):
    """0 where the coordinator has not counted anything yet; for each label of a metric if one is named."""
    base = f"sum by (loop) ({of('looptrain_loop_loss')})" if by == "loop" else f"sum({of('looptrain_run_info')})"
    return f"{expression} or 0 * {base}"


def total(metric, labels=""):
    """What the coordinator has counted since it started."""
    return zero(f"sum({of(metric, labels)})")


def quantile(share, metric, scope=RUN, by="", window="$__rate_interval"):
    """A quantile over a window; without one over all since the process started, for what is rare."""
    series = of(f"{metric}_bucket", scope=scope)
    series = f"rate({series}[{window}])" if window else series
    return f"histogram_quantile({share}, sum by ({', '.join(filter(None, ['le', by]))}) ({series}))"


def mean(metric, by="", scope=RUN, window="$__rate_interval"):
    """The mean over a window; without one over all since the process started."""
    parts = [of(f"{metric}_{part}", scope=scope) for part in ("sum", "count")]
    parts = [f"rate({part}[{window}])" if window else part for part in parts]
    return " / ".join(f"sum by ({by}) ({part})" if by else f"sum({part})" for part in parts)


def phase():
    """The phase as a number, in the order of PHASES."""
    number = lambda at, name: f"{at} * max({of('looptrain_run_phase', f'phase={json.dumps(name)}')})"
    return " + ".join(number(at, name) for at, name in enumerate(PHASES))


class Target:
    """A query: what to ask, and what its series are called."""

    def __init__(self, expression, legend="", instant=False, as_table=False):
        self.expression, self.legend, self.instant, self.as_table = expression, legend, instant, as_table

    def build(self, at):
        query = prometheus.Dataquery().ref_id(chr(ord("A") + at)).expr(self.expression).datasource(SOURCE)
        query = query.legend_format(self.legend or "__auto")
        query = query.format(PromQueryFormat.TABLE if self.as_table else PromQueryFormat.TIME_SERIES)
        return query.instant() if self.instant or self.as_table else query.range()


def limits(*steps):
    """Thresholds: a colour, then pairs of a value and the colour from there on."""
    marks = [model.Threshold(value=None, color=steps[0])]
    marks += [model.Threshold(value=value, color=color) for value, color in zip(steps[1::2], steps[2::2])]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(marks)


def prepared(panel, title, text, targets, width, height, unit, alerts, thresholds, bounds, decimals):
    """What all kinds of panels have."""
    panel = panel.title(title).description(text).datasource(SOURCE).span(width).height(height)
    for at, target in enumerate(targets):
        panel = panel.with_target(target.build(at))
    if unit:
        panel = panel.unit(unit)
    if decimals is not None:
        panel = panel.decimals(decimals)
    low, high = bounds
    panel = panel if low is None else panel.min(low)
    panel = panel if high is None else panel.max(high)
    if thresholds:
        panel = panel.thresholds(limits(*thresholds))
    links = [
        dashboard.DashboardLink(f"Runbook: {alert}")
        .type(model.DashboardLinkType.LINK)
        .url(f"${{repository}}/docs/runbooks.md#{alert.lower()}")
        .target_blank(True)
        for alert in alerts
    ]
    return panel.links(links) if links else panel


def graph(
    title, text, targets, width=12, height=8, unit="short", alerts=(), thresholds=(), bounds=(None, None),
    decimals=None, stacked=None, stepped=False, log=False, right=(),
):
    """Values over time. `right` names the legends with an axis of their own: a legend and a unit each."""
    panel = prepared(
        timeseries.Panel(), title, text, targets, width, height, unit, alerts, thresholds, bounds, decimals
    )
    named = any(target.legend for target in targets)
    many = len(targets) > 1 or any("{{" in target.legend for target in targets)
    legend = common.VizLegendOptions().show_legend(named).placement(kinds.LegendPlacement.BOTTOM)
    legend = legend.display_mode(kinds.LegendDisplayMode.TABLE if many else kinds.LegendDisplayMode.LIST)
    legend = legend.calcs(["lastNotNull", "max"] if many else [])
    tooltip = common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING)
    panel = panel.legend(legend).tooltip(tooltip).line_width(1).show_points(kinds.VisibilityMode.NEVER)
    panel = panel.fill_opacity(60 if stacked else 5)
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(stacked).group("A"))
    if stepped:
        panel = panel.line_interpolation(kinds.LineInterpolation.STEP_AFTER)
    if log:
        panel = panel.scale_distribution(common.ScaleDistributionConfig().type(kinds.ScaleDistribution.LOG).log(10))
    if thresholds:
        panel = panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED)
        )
    for name, its_unit in right:
        panel = panel.override_by_name(
            name,
            [
                model.DynamicConfigValue(id_val="custom.axisPlacement", value="right"),
                model.DynamicConfigValue(id_val="unit", value=its_unit),
            ],
        )
    return panel


def number(
    title, text, targets, width=4, height=4, unit="short", alerts=(), thresholds=("text",), bounds=(None, None),
    decimals=None, mappings=(),
):
    """The newest value, large."""
    panel = prepared(stat.Panel(), title, text, targets, width, height, unit, alerts, thresholds, bounds, decimals)
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel = panel.graph_mode(kinds.BigValueGraphMode.NONE).color_mode(kinds.BigValueColorMode.VALUE)
    panel = panel.text_mode(
        kinds.BigValueTextMode.VALUE_AND_NAME if len(targets) > 1 else kinds.BigValueTextMode.VALUE
    )
    return panel.mappings(list(mappings)) if mappings else panel


def bars(
    title, text, targets, width=12, height=8, unit="short", alerts=(), thresholds=("blue",), bounds=(0, None),
    decimals=None,
):
    """The newest values beside one another."""
    panel = prepared(
        bargauge.Panel(), title, text, targets, width, height, unit, alerts, thresholds, bounds, decimals
    )
    panel = panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.orientation(kinds.VizOrientation.HORIZONTAL).display_mode(kinds.BarGaugeDisplayMode.BASIC)


def phase_names():
    names = {
        str(at): model.ValueMappingResult(text=name, color=color, index=at)
        for at, (name, color) in enumerate(PHASES.items())
    }
    return [model.ValueMap(options=names)]


def phases_over_time(title, text, width, height, alerts):
    panel = prepared(
        statetimeline.Panel(), title, text, [Target(phase(), "phase")], width, height, "", alerts, ("text",),
        (None, None), None,
    )
    panel = panel.mappings(phase_names()).merge_values(True).show_value(kinds.VisibilityMode.AUTO)
    return panel.legend(common.VizLegendOptions().show_legend(False).display_mode(kinds.LegendDisplayMode.LIST))


def rows_of(title, text, columns, width, height, alerts=(), by=("worker", "rank")):
    """A table: a column for each (name, unit, query) beside the labels."""
    targets = [Target(query, as_table=True) for _, _, query in columns]
    panel = prepared(
        table.Panel(), title, text, targets, width, height, "short", alerts, (), (None, None), None
    )
    value = lambda at: "Value" if len(columns) == 1 else f"Value #{chr(ord('A') + at)}"
    order = {name: at for at, name in enumerate([*by, *(value(at) for at in range(len(columns)))])}
    names = {value(at): name for at, (name, _, _) in enumerate(columns)}
    if len(columns) > 1:
        panel = panel.with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
    organize = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": names}
    panel = panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=organize))
    for name, unit, _ in columns:
        panel = panel.override_by_name(name, [model.DynamicConfigValue(id_val="unit", value=unit)])
    return panel


def counts(metric, label, values, legend=None):
    """A query for each value of a label, 0 where there was none."""
    return [Target(total(metric, f'{label}="{value}"'), legend or value) for value in values]


def queried(name, label, query, many, about):
    variable = dashboard.QueryVariable(name).label(label).description(about).datasource(SOURCE)
    variable = variable.query({"query": query, "refId": f"variable-{name}"}).definition(query)
    variable = variable.refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(
        model.VariableSort.ALPHABETICAL_ASC
    )
    if many:
        everything = model.VariableOption(selected=True, text=["All"], value=["$__all"])
        variable = variable.multi(True).include_all(True).current(everything)
    return variable


def variables(own):
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    repository = (
        dashboard.TextBoxVariable("repository")
        .description("Where the repository can be read, for links to docs/runbooks.md.")
        .default_value(REPOSITORY)
        .current(model.VariableOption(selected=True, text=REPOSITORY, value=REPOSITORY))
        .hide(model.VariableHide.HIDE_VARIABLE)
    )
    return [source, *own, repository]


def of_a_run():
    return [
        queried("run", "Run", "label_values(looptrain_run_info, run)", False, "The run's name in its spec."),
        queried(
            "instance", "Coordinator", 'label_values(looptrain_run_info{run=~"$run"}, instance)', True,
            "Coordinators of the run in this time range: more than one after it has moved.",
        ),
    ]


def of_processes():
    return [
        queried(
            "job", "Job", "label_values(looptrain_store_operations_total, job)", True,
            "Coordinators or workers, as the scrape configuration calls them.",
        ),
        queried(
            "instance", "Process", 'label_values(looptrain_store_operations_total{job=~"$job"}, instance)', True,
            "Metrics of the coordinator (checkpoints) and of workers (feed) are there while theirs are chosen.",
        ),
    ]


def links(name):
    """To the other dashboards, with what is chosen where they have a choice of the same kind."""
    for other, title in DASHBOARDS.items():
        if other == name:
            continue
        keeps = "${datasource:queryparam}" + ("" if "storage" in (name, other) else "&${run:queryparam}")
        yield (
            dashboard.DashboardLink(title)
            .type(model.DashboardLinkType.LINK)
            .icon("dashboard")
            .url(f"/d/looptrain-{other}?{keeps}")
            .keep_time(True)
        )


def generations(scope=RUN):
    """Marks where a generation was formed: what curves do there has to do with the workers."""
    return (
        dashboard.AnnotationQuery()
        .name("Generations")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("orange")
        .expr(f"changes({of('looptrain_generation', scope=scope)}[$__rate_interval]) > 0")
        .title_format("new generation")
        .step("15s")
    )


def page(name, about, own_variables, rows):
    built = (
        dashboard.Dashboard(f"looptrain / {DASHBOARDS[name]}")
        .uid(f"looptrain-{name}")
        .description(about)
        .tags(["looptrain"])
        .editable()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .variables(variables(own_variables))
        .links(list(links(name)))
        .annotation(generations())
    )
    identity = 0
    for title, panels in rows:
        identity += 1
        built = built.with_row(dashboard.Row(title).id(identity))
        for panel in panels:
            identity += 1
            built = built.with_panel(panel.id(identity))
    return built.build()


def run_page():
    trouble = [
        Target(total("looptrain_steps_retried_total"), "steps retried"),
        Target(total("looptrain_steps_skipped_total"), "steps skipped"),
        Target(total("looptrain_rewinds_total"), "rewinds"),
        Target(total("looptrain_divergences_total"), "divergences"),
    ]
    productive = of("looptrain_goodput_time_seconds_total", 'category="productive"')
    all_time = of("looptrain_goodput_time_seconds_total")
    now = [
        number(
            "Phase",
            "What the run is doing. `looptrain status` says why. Waiting: too few workers. Failed: the log's last "
            "lines say what went wrong.",
            [Target(phase(), "phase")],
            alerts=["LooptrainCoordinatorDown", "LooptrainRunFailed", "LooptrainWaitingForWorkers"],
            mappings=phase_names(),
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
    training = [
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
    goodput = [
        number(
            "Goodput",
            "Share of the workers' time since the run began that went into steps for the first time.",
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
            "Productive share of the workers' time in the last five minutes. It dips when workers die or join.",
            [Target(f"sum(rate({productive}[5m])) / sum(rate({all_time}[5m]))", "last 5 minutes")],
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
            "Worker-seconds by category. The largest beside productive is what to work on first.",
            [Target(f"sort_desc(sum by (category) ({all_time}))", "{{category}}", instant=True)],
            width=5,
            unit="s",
        ),
    ]
    members = [
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
        phases_over_time(
            "Phases",
            "What the run did when.",
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
            trouble,
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainStepsSkipped", "LooptrainRewind", "LooptrainRanksDiverge"],
        ),
    ]
    checkpoints = [
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
    return page(
        "run",
        "A run at a glance: where it stands, how fast it is, and what becomes of the workers' time.",
        of_a_run(),
        [
            ("Now", now),
            ("Training", training),
            ("Goodput", goodput),
            ("Workers", members),
            ("Checkpoints", checkpoints),
        ],
    )


def workers_page():
    duration = "looptrain_worker_section_duration_seconds"
    section = lambda name: of(duration, f'section="{name}"')
    columns = [
        ("slots", "none", f"sum by (worker, rank) ({of('looptrain_worker_slots')})"),
        ("slots/s", "none", f"sum by (worker, rank) ({of('looptrain_worker_slot_rate_per_second')})"),
        *((name, "s", f"sum by (worker, rank) ({section(name)})") for name in SECTIONS),
    ]
    now = [
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
            "The rank with the longest time in its newest step. One that stays here for many refreshes, far above "
            "the others, is a straggler.",
            [("seconds", "s", f"topk by (section) (1, sum by (section, rank, worker) ({of(duration)}))")],
            8,
            9,
            alerts=["LooptrainStraggler"],
            by=("section", "rank", "worker"),
        ),
    ]
    per_rank = [
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
    per_rank.append(
        graph(
            "What the slowest rank costs",
            "Per section, the slowest rank's time less the mean of all: what a step would save if all were alike. "
            "The slowest of each section may be another one.",
            [
                Target(
                    f"max by (section) ({of(duration)}) - avg by (section) ({of(duration)})", "{{section}}"
                )
            ],
            width=8,
            unit="s",
            bounds=(0, None),
            alerts=["LooptrainStraggler"],
        )
    )
    slots = [
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
    coming = [
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
    trouble = [
        graph(
            "Times that a worker began to straggle",
            "Since this coordinator started, by section. The log names the worker and what it costs a step.",
            counts("looptrain_stragglers_total", "section", ["data", "compute", "reduce", "commit"]),
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
    return page(
        "workers",
        "Who computes what, who is slow, who comes and goes.",
        of_a_run(),
        [
            ("Now", now),
            ("Sections of a step, by rank", per_rank),
            ("Slots", slots),
            ("Coming and going", coming),
            ("Trouble", trouble),
        ],
    )


def storage_page():
    operations = of("looptrain_store_operations_total", scope=ALL)
    failed = of("looptrain_store_operations_total", 'outcome="failed"', scope=ALL)
    retries = of("looptrain_store_retries_total", scope=ALL)
    latency = "looptrain_store_operation_duration_seconds"
    blocks = of("looptrain_feed_blocks_total", scope=ALL)
    fed = f"sum({blocks})"
    counted = lambda expression: f"{expression} or 0 * sum({of('target_info', scope=ALL)})"
    calls = [
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
            [
                Target(
                    f"sum by (operation) ({failed}) or 0 * sum by (operation) ({operations})", "{{operation}}"
                )
            ],
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
                    f"(sum by (operation) (rate({retries}[5m])) or 0 * sum by (operation) ({operations}))"
                    f" / sum by (operation) (rate({operations}[5m]))",
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
            [Target(quantile(0.5, latency, ALL, OPERATIONS, "5m"), "{{operation}}")],
            width=8,
            unit="s",
            log=True,
        ),
        graph(
            "Latency, p99",
            "Of a call with all its attempts and pauses, over five minutes. Reads that are slow get a second one "
            "beside them; writes that are slow make checkpoints late.",
            [Target(quantile(0.99, latency, ALL, OPERATIONS, "5m"), "{{operation}}")],
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
    step, saved = of("looptrain_step", scope=ALL), of("looptrain_checkpoint_step", scope=ALL)
    age = of("looptrain_checkpoint_age_seconds", scope=ALL)
    duration, stall = "looptrain_checkpoint_duration_seconds", "looptrain_checkpoint_stall_seconds"
    checkpoints = [
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
                Target(counted(f"sum({of('looptrain_checkpoint_failures_total', scope=ALL)})"), "failed"),
                Target(counted(f"sum({of('looptrain_checkpoint_delays_total', scope=ALL)})"), "delayed"),
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
    feed = [
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
    telemetry = [
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
    return page(
        "storage",
        "The object store as coordinator and workers see it: calls, checkpoints, and the feed of tokens.",
        of_processes(),
        [("Calls", calls), ("Checkpoints", checkpoints), ("Feed", feed), ("Telemetry", telemetry)],
    )


def looplm_page():
    per_loop = lambda metric: f"max by (loop) ({of(metric)})"
    named = "loop {{loop}}"
    losses = [
        graph(
            "Loss of each loop",
            "Cross-entropy after each loop, nats per token. Each should fall, and the last should be lowest: loops "
            "that add nothing lie on one another.",
            [Target(per_loop("looptrain_loop_loss"), named)],
            width=8,
            unit="none",
            decimals=4,
            alerts=["LooptrainLoopLossRising"],
        ),
        graph(
            "Above its lowest",
            "How far a loop's loss, as a mean over 50 steps, is above its lowest of the stage. A loop is said to rise "
            "from 0.05 nats, 2 % and one deviation of its noise on, whichever is most. It is judged from the "
            "hundredth step of a stage on; before that 0 is shown.",
            [
                Target(
                    f"{per_loop('looptrain_loop_loss_above_lowest')} or 0 * {per_loop('looptrain_loop_loss')}", named
                )
            ],
            width=8,
            unit="none",
            decimals=4,
            bounds=(0, None),
            thresholds=("green", 0.05, "orange"),
            alerts=["LooptrainLoopLossRising"],
        ),
        graph(
            "Times that a loop's loss began to rise",
            "Since this coordinator started. The trained loss may fall all the while.",
            [
                Target(
                    zero(f"sum by (loop) ({of('looptrain_loop_loss_rises_total')})", by="loop"), named
                )
            ],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainLoopLossRising"],
        ),
    ]
    gate = [
        number(
            "Gate collapses",
            "Times that 95 % of the exits came to be after one loop, since this coordinator started.",
            [Target(total("looptrain_gate_collapses_total"))],
            height=4,
            decimals=0,
            thresholds=("green", 1, "red"),
            alerts=["LooptrainGateCollapsed"],
        ),
        number(
            "Largest exit share",
            "Share of the exits that are after one loop. Above 0.95, as a mean over 50 steps, the gate has collapsed; "
            "a larger entropy_weight keeps the others in use.",
            [Target(f"max({of('looptrain_exit_probability_ratio')})")],
            height=4,
            unit="percentunit",
            bounds=(0, 1),
            decimals=1,
            thresholds=("green", 0.9, "orange", 0.95, "red"),
            alerts=["LooptrainGateCollapsed"],
        ),
        number(
            "Mean depth",
            "Mean loop of exit, counted from 1.",
            [Target(f"max({of('looptrain_exit_depth')})")],
            height=4,
            unit="none",
            decimals=2,
        ),
        number(
            "Entropy",
            "Mean entropy of the exit distribution, nats. 0: every token exits after the same loop.",
            [Target(f"max({of('looptrain_exit_entropy')})")],
            height=4,
            unit="none",
            decimals=3,
        ),
        number(
            "Validation loss",
            "Stage I loss on the validation split at the newest evaluation, nats per token.",
            [Target(f"max({of('looptrain_validation_loss')})")],
            height=4,
            unit="none",
            decimals=4,
        ),
        number(
            "Perplexity",
            "Of the last loop on the validation split, at the newest evaluation.",
            [Target(f"max({of('looptrain_validation_perplexity_ratio')})")],
            height=4,
            unit="none",
            decimals=2,
        ),
        graph(
            "Exit distribution",
            "Mean exit probability of each loop. One colour that takes all is a gate that has collapsed.",
            [Target(per_loop("looptrain_exit_probability_ratio"), named)],
            width=8,
            unit="percentunit",
            bounds=(0, 1),
            stacked=kinds.StackingMode.NORMAL,
            alerts=["LooptrainGateCollapsed"],
        ),
        graph(
            "Depth and entropy",
            "Mean loop of exit, and the entropy of the exit distribution on the right. A depth that goes to 1 or to "
            "the number of loops while the entropy goes to 0 is a gate on its way to collapse.",
            [
                Target(f"max({of('looptrain_exit_depth')})", "mean depth"),
                Target(f"max({of('looptrain_exit_entropy')})", "entropy"),
            ],
            width=8,
            unit="none",
            alerts=["LooptrainGateCollapsed"],
            right=[("entropy", "none")],
        ),
        graph(
            "Gate collapses over time",
            "Since this coordinator started; a coordinator that takes over counts anew.",
            [Target(total("looptrain_gate_collapses_total"), "collapses")],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainGateCollapsed"],
        ),
    ]
    inside = [
        graph(
            "Agreement with the last loop",
            "Share of the tokens whose likeliest successor after a loop is that after the last. Near 1 for an early "
            "loop: the later ones change little.",
            [Target(per_loop("looptrain_loop_agreement_ratio"), named)],
            width=8,
            unit="percentunit",
            bounds=(0, 1),
        ),
        graph(
            "Hidden RMS",
            "Root mean square of a token's residual stream at the end of each loop, before its norm. One that grows "
            "without end comes before overflow in bf16.",
            [Target(per_loop("looptrain_loop_hidden_rms_ratio"), named)],
            width=8,
            unit="none",
            bounds=(0, None),
        ),
        graph(
            "Gradient norm of each loop",
            "By a token's state after each loop. Loops whose norm is orders of magnitude below the others learn "
            "nothing; 0 where the gate alone is trained.",
            [Target(per_loop("looptrain_loop_gradient_norm_ratio"), named)],
            width=8,
            unit="none",
            bounds=(0, None),
        ),
    ]
    validation = [
        graph(
            "Validation loss",
            "At each evaluation: the Stage I loss, and the cross-entropy after each loop, nats per token. Validation "
            "that rises while training falls is overfitting.",
            [
                Target(f"max({of('looptrain_validation_loss')})", "Stage I loss"),
                Target(per_loop("looptrain_validation_loop_loss"), named),
            ],
            unit="none",
            decimals=4,
            stepped=True,
        ),
        graph(
            "Validation perplexity",
            "Of the last loop.",
            [Target(f"max({of('looptrain_validation_perplexity_ratio')})", "perplexity")],
            width=6,
            unit="none",
            stepped=True,
        ),
        graph(
            "Validation less training",
            "By how much the validation loss of each loop is above its training loss, nats per token. Training loss "
            "is of one step, and therefore noisy.",
            [
                Target(
                    f"{per_loop('looptrain_validation_loop_loss')} - {per_loop('looptrain_loop_loss')}", named
                )
            ],
            width=6,
            unit="none",
            decimals=3,
        ),
    ]
    return page(
        "looplm",
        "What the loops of the model do: losses by depth, the exit gate, and the states between loops.",
        of_a_run(),
        [
            ("Losses by loop", losses),
            ("Exit gate", gate),
            ("Between the loops", inside),
            ("Validation", validation),
        ],
    )


PAGES = {"run": run_page, "workers": workers_page, "storage": storage_page, "looplm": looplm_page}


def main():
    arguments = argparse.ArgumentParser(description="Writes the Grafana dashboards.")
    arguments.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a file differs")
    check = arguments.parse_args().check
    stale = []
    for name, build in PAGES.items():
        text = json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"
        path = HERE / f"{name}.json"
        if check:
            if not path.is_file() or path.read_text() != text:
                stale.append(path.name)
        else:
            path.write_text(text)
    if stale:
        sys.exit(f"not what build.py writes: {', '.join(stale)}; run python3 ops/grafana/build.py")


if __name__ == "__main__":
    main()
