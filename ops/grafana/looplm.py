"""What the loops of the model do."""

from grafana_foundation_sdk.models import common as kinds

from pages import of_a_run, page
from panels import graph, number
from queries import Target, of, total

LEGEND = "loop {{loop}}"


def per_loop(metric):
    """A metric with a series for each loop."""
    return f"max by (loop) ({of(metric)})"


def losses():
    """Losses by depth."""
    return [
        graph(
            "Loss of each loop",
            "Cross-entropy after each loop, nats per token. Each should fall, and the last should be lowest: loops "
            "that add nothing lie on one another.",
            [Target(per_loop("looptrain_loop_loss"), LEGEND)],
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
                    f"{per_loop('looptrain_loop_loss_above_lowest')} or 0 * {per_loop('looptrain_loop_loss')}", LEGEND
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
            [Target(f"sum by (loop) ({of('looptrain_loop_loss_rises_total')})", LEGEND)],
            width=8,
            unit="none",
            decimals=0,
            bounds=(0, None),
            stepped=True,
            alerts=["LooptrainLoopLossRising"],
        ),
    ]


def gate():
    """After which loop tokens exit."""
    return [
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
            [Target(per_loop("looptrain_exit_probability_ratio"), LEGEND)],
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


def inside():
    """The states between loops."""
    return [
        graph(
            "Agreement with the last loop",
            "Share of the tokens whose likeliest successor after a loop is that after the last. Near 1 for an early "
            "loop: the later ones change little.",
            [Target(per_loop("looptrain_loop_agreement_ratio"), LEGEND)],
            width=8,
            unit="percentunit",
            bounds=(0, 1),
        ),
        graph(
            "Hidden RMS",
            "Root mean square of a token's residual stream at the end of each loop, before its norm. One that grows "
            "without end comes before overflow in bf16.",
            [Target(per_loop("looptrain_loop_hidden_rms_ratio"), LEGEND)],
            width=8,
            unit="none",
            bounds=(0, None),
        ),
        graph(
            "Gradient norm of each loop",
            "By a token's state after each loop. Loops whose norm is orders of magnitude below the others learn "
            "nothing; 0 where the gate alone is trained.",
            [Target(per_loop("looptrain_loop_gradient_norm_ratio"), LEGEND)],
            width=8,
            unit="none",
            bounds=(0, None),
        ),
    ]


def validation():
    """The same on data that is not trained on."""
    return [
        graph(
            "Validation loss",
            "At each evaluation: the Stage I loss, and the cross-entropy after each loop, nats per token. Validation "
            "that rises while training falls is overfitting.",
            [
                Target(f"max({of('looptrain_validation_loss')})", "Stage I loss"),
                Target(per_loop("looptrain_validation_loop_loss"), LEGEND),
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
                    f"{per_loop('looptrain_validation_loop_loss')} - {per_loop('looptrain_loop_loss')}", LEGEND
                )
            ],
            width=6,
            unit="none",
            decimals=3,
        ),
    ]


def board():
    return page(
        "looplm",
        "What the loops of the model do: losses by depth, the exit gate, and the states between loops.",
        of_a_run(),
        [
            ("Losses by loop", losses()),
            ("Exit gate", gate()),
            ("Between the loops", inside()),
            ("Validation", validation()),
        ],
    )
