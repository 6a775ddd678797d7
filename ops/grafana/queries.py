"""What panels ask: selectors, expressions that many of them share, and a query with its name.

Metrics are called as in docs/metrics.md. A counter begins at 0 with the process that counts: what
has never happened needs no care.
"""

from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")

# Of the loss of a worker.
CAUSES = ["died", "silent", "left", "expelled"]

# The process that counts, for matchers: the coordinators of the run, or what is chosen of all processes.
RUN = 'instance=~"$instance"'
ALL = 'job=~"$job",instance=~"$instance"'


def of(metric, labels="", scope=RUN):
    """A selector of a metric's series."""
    return f"{metric}{{{','.join(part for part in (scope, labels) if part)}}}"


def total(metric, labels="", scope=RUN):
    """What processes have counted since they started."""
    return f"sum({of(metric, labels, scope)})"


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


class Target:
    """A query: what to ask, and what its series are called."""

    def __init__(self, expression, legend="", instant=False, as_table=False):
        self.expression, self.legend, self.instant, self.as_table = expression, legend, instant, as_table

    def build(self, at):
        query = prometheus.Dataquery().ref_id(chr(ord("A") + at)).expr(self.expression).datasource(SOURCE)
        query = query.legend_format(self.legend or "__auto")
        query = query.format(PromQueryFormat.TABLE if self.as_table else PromQueryFormat.TIME_SERIES)
        return query.instant() if self.instant or self.as_table else query.range()


def counts(metric, label, values):
    """A query for each value of a label."""
    return [Target(total(metric, f'{label}="{value}"'), value) for value in values]
