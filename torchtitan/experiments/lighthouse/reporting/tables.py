"""What the curves say, in figures."""

from __future__ import annotations

from itertools import pairwise
from statistics import stdev

from torchtitan.experiments.lighthouse.reporting.experiments import Experiment, baseline_of, differences, in_words
from torchtitan.experiments.lighthouse.runs.records import number_of, recovered_after

#: A heading, the column names and the rows below them.
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


def tables(experiments: list[Experiment], window: int) -> list[Table]:
    """Every stage's figures, and what became of every switch. Losses in nats per token."""
    rows: list[tuple[str, ...]] = []
    chains = [experiment for experiment in experiments if len(experiment.parts) > 1]
    for experiment in experiments:
        for part in experiment.parts:
            stage = f"Stage {number_of(part.name)} ({in_words(part, experiment.changes_context)})"
            if experiment in chains and (len(chains) > 1 or experiment.labelled):
                stage = f"{experiment.name}: {stage}"
            # One step says nothing of the noise.
            noise = f" ± {stdev(part.losses[-window:]):.4f}" if window > 1 else ""
            rows.append(
                (
                    stage if number_of(experiment.parts[-1].name) > 1 else experiment.name,
                    f"{part.steps[0]:,}–{part.steps[-1]:,}",
                    f"{part.tokens[-1]:,.0f}",
                    f"{part.smooth(window)[-1]:.4f}{noise}",
                    f"{part.tokens_per_second:,.0f}",
                )
            )
    stages = (
        "Runs",
        (
            "run",
            "steps",
            "tokens seen",
            f"loss, mean of last {window}" if window > 1 else "loss of the last step",
            "tokens/s/device",
        ),
        rows,
    )
    dense = baseline_of(experiments)
    switches: list[Table] = []
    for experiment in experiments:
        parts = experiment.parts
        for before, after in pairwise(parts):
            which = f" to Stage {number_of(after.name)}" if len(parts) > 2 else ""
            # The loss through Lighthouse is not one that can be compared.
            ends = after.name == parts[-1].name and not after.lighthouse
            against = _against(experiment, dense, window) if dense and ends else []
            heading = f"The switch of {experiment.name}{which}"
            switches.append((heading, ("", ""), [*_switch(before, after, window), *against]))
    return [stages, *switches]


def headlines(experiments: list[Experiment]) -> list[str]:
    """What Lighthouse is for, a sentence for each stage through it: its rate beside that of dense attention.

    The dense run's rate, or, where there is none of this context, that of the same run's last dense stage of it.
    """
    baseline = baseline_of(experiments)
    sentences = []
    for experiment in experiments:
        own = [part for part in reversed(experiment.parts) if not part.lighthouse]
        for part in experiment.parts:
            dense = [one for one in [*([baseline] if baseline else []), *own] if _same_context(one, part)]
            if part.lighthouse and dense and dense[0].tokens_per_second:
                whose = "" if len(experiments) <= 2 else f" of {experiment.name}"
                stage, times = number_of(part.name), part.tokens_per_second / dense[0].tokens_per_second
                sentences.append(
                    f"Stage {stage}{whose} ran {times:.1f} times as many tokens per second as dense attention."
                )
    return sentences


def _same_context(one: Experiment, other: Experiment) -> bool:
    return one.seq_len == other.seq_len or None in (one.seq_len, other.seq_len)


def _switch(before: Experiment, after: Experiment, window: int) -> list[tuple[str, str]]:
    level, first = before.smooth(window)[-1], after.losses[0]
    losses = dict(zip(before.steps + after.steps, before.losses + after.losses, strict=True))
    recovered = recovered_after(losses, before.steps[-1], window * _steps_per_line(after))
    left = f"not within {len(after.steps):,} ({after.smooth(window)[-1] - level:+.4f})"
    kind, earlier = "Lighthouse" if after.lighthouse else "dense", f"Stage {number_of(before.name)}"
    return [
        (f"spike, first {kind} step", f"{first:.4f} ({first - level:+.4f}) at step {after.steps[0]:,}"),
        (f"{kind} steps until {earlier}'s last level", f"{recovered:,}" if recovered else left),
    ]


def _steps_per_line(part: Experiment) -> int:
    """``metrics.log_freq``, as far as the file tells."""
    return min((after - before for before, after in pairwise(part.steps)), default=1)


def _against(experiment: Experiment, dense: Experiment, window: int) -> list[tuple[str, str]]:
    """Beside the dense run: differences at the same steps, so on the same data, as means over ``window`` of them."""
    last = experiment.parts[-1]
    beside = differences(last, dense)
    if not beside.records:
        return [(f"beside {dense.name}", "no step in common")]
    # From the first whole window on: a mean over fewer steps than the last gap's would contradict it by chance.
    whole = min(window, len(beside.records)) - 1
    steps, gaps = beside.steps[whole:], beside.smooth(window)[whole:]
    tokens = min(experiment.tokens[-1], dense.tokens[-1])
    ours, theirs = (run.device_seconds(tokens) for run in (experiment, dense))
    return [
        (f"first below {dense.name} after", _first_below(steps, gaps, last.steps[0], len(beside.records))),
        (f"last gap to {dense.name}", f"{gaps[-1]:+.4f} at step {steps[-1]:,}"),
        (f"speed-up over {dense.name} at {tokens:,.0f} tokens", f"{theirs / ours:.2f}" if ours else "no rate yet"),
    ]


def _first_below(steps: list[int], gaps: list[float], first_step: int, logged: int) -> str:
    """After how many dense steps the gap was first not above 0, and whether it stayed so."""
    at = next((i for i, gap in enumerate(gaps) if gap <= 0), None)
    if at is None:
        return f"not within {logged:,}"
    taken = steps[at] - first_step + 1
    crossed = f"{taken:,} dense step{'s' if taken > 1 else ''}"
    below = sum(gap <= 0 for gap in gaps)
    if below == len(gaps) - at:
        return f"{crossed}, and stays below"
    end = "below" if gaps[-1] <= 0 else "above"
    return f"{crossed}, but does not stay: below at {below:,} of {len(gaps):,} logged steps, {end} it at the last"
