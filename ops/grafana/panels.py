"""The kinds of panels, from a title, a text and queries.

A panel whose numbers an alert watches links to the alert's section in docs/runbooks.md; where that can be
read is the dashboards' variable `repository`.
"""

from grafana_foundation_sdk.builders import bargauge, common, dashboard
from grafana_foundation_sdk.builders import stat, statetimeline, table, timeseries
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as model

from queries import SOURCE, Target


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


def mapping(colors):
    """Names and colours for the numbers from 0 on."""
    names = {
        str(at): model.ValueMappingResult(text=name, color=color, index=at)
        for at, (name, color) in enumerate(colors.items())
    }
    return [model.ValueMap(options=names)]


def states(title, text, targets, mappings, width, height, alerts=()):
    """What something was at each time, one of some named states: a band for each series."""
    panel = prepared(
        statetimeline.Panel(), title, text, targets, width, height, "", alerts, ("text",), (None, None), None
    )
    panel = panel.mappings(list(mappings)).merge_values(True).show_value(kinds.VisibilityMode.AUTO)
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
