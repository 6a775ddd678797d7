"""A dashboard around its panels: variables, links to the others, marks of generations."""

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as model

from queries import SOURCE, of

REPOSITORY = "https://example.org/looptrain"
TITLES = {"run": "Run", "workers": "Workers", "storage": "Storage", "looplm": "LoopLM"}


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
    for other, title in TITLES.items():
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


def generations():
    """Marks where a generation was formed: what curves do there has to do with the workers."""
    return (
        dashboard.AnnotationQuery()
        .name("Generations")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("orange")
        .expr(f"changes({of('looptrain_generation')}[$__rate_interval]) > 0")
        .title_format("new generation")
        .step("15s")
    )


def page(name, about, own_variables, rows):
    built = (
        dashboard.Dashboard(f"looptrain / {TITLES[name]}")
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
