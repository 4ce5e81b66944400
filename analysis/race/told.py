"""What the report of a race says in words and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.race.decide import least_ratio, race_pairs
from analysis.race.results import Axis, Race, RacePair
from analysis.show import wording
from analysis.show.report import Card, Finding, Table
from analysis.show.wording import THIN, TIMES, count, number, quantity

__all__ = ["cards_of", "findings_of", "tables_of"]


# -- cards and findings -----------------------------------------------------------------------------------------------


def cards_of(race: Race) -> tuple[Card, ...]:
    """Return the key numbers."""
    leaders, names = race.leaders(), race.raced()
    decided = sum(p.verdict != "undecided" for p in race.pairs)
    first = names[0] if names else ""
    loss = race.final(first)
    cards = [
        Card(
            label="Ahead",
            value=leaders[0] if len(leaders) == 1 else "undecided",
            hint=f"of {count(_count(race.pairs, leaders[0], 'ahead'))} of {count(len(names) - 1)} others"
            if len(leaders) == 1
            else f"among {count(len(leaders))} of {count(len(names))}",
        ),
        Card(
            label="Lowest loss",
            value=number(loss.value, 3),
            error=_error(loss.stderr),
            hint=f"{first}, mean over seeds",
        ),
        Card(label="Pairs decided", value=f"{count(decided)} of {count(len(race.pairs))}", hint="by training loss"),
    ]
    if len(names) < 2:  # nobody to compare with
        cards = cards[1:2]
    if race.metric:
        best = _best_metric(race)
        cards.append(
            Card(
                label=race.metric.capitalize(),
                value=_metric(race, best),
                error=_metric_error(race, best),
                hint=f"{best}, the best mean",
            )
        )
    lost = [name for name in names if race.diverged(name) > 0]
    whole = sum(bool(c.diverged) for name in names for c in race.of(name))
    cards.append(
        Card(label="Diverged", value=count(whole), hint=f"of {count(_trainings(race))} trainings; {_list(lost)}")
    )
    spent, search = (_seconds(race, searching=s) for s in (False, True))
    if search > 0:
        hint = f"of the time of the race itself, {wording.duration(spent)}"
        cards.append(
            Card(label="Searches cost", value=f"{number(search / spent, 2)} {TIMES}" if spent else "", hint=hint)
        )
    return tuple(cards)


def _best_metric(race: Race) -> str:
    sign = -1 if race.metric == "accuracy" else 1
    names = [n for n in race.raced() if math.isfinite(race.final(n, "metric").value)]
    return min(names, key=lambda n: sign * race.final(n, "metric").value, default="")


def _metric(race: Race, name: str) -> str:
    value = race.final(name, "metric").value if name else math.nan
    return f"{number(100 * value, 3)}{THIN}%" if race.metric == "accuracy" else number(value, 3)


def _metric_error(race: Race, name: str) -> str:
    stderr = race.final(name, "metric").stderr if name else math.nan
    return _error(100 * stderr) + f"{THIN}%" * math.isfinite(stderr) if race.metric == "accuracy" else _error(stderr)


def _error(stderr: float) -> str:
    return f"± {number(stderr, 2)}" if math.isfinite(stderr) else ""


def _trainings(race: Race) -> int:
    return sum(len(race.of(name)) for name in race.raced())


def _seconds(race: Race, *, searching: bool, name: str | None = None) -> float:
    courses = [c for c in race.courses if (c.seed == 0) == searching and name in (None, c.entrant)]
    return sum(c.end.seconds for c in courses if c.points)


def findings_of(race: Race) -> tuple[Finding, ...]:
    """Return what the numbers mean."""
    budget = f"{count(race.budget)} {race.unit}"
    found = [Finding(f"Who is ahead after {budget}?", _ahead(race, race.pairs))]
    by: tuple[tuple[Axis, str], ...] = (("steps", "steps"), ("seconds", "time"), ("gradients", "work"))
    for axis, what in by:
        if axis != race.unit and math.isfinite(race.common(axis)):
            limit = _amount(race.common(axis))
            unit = {"seconds": "s"}.get(axis, axis)
            question = f"And at equal {what}?"
            found.append(Finding(question, f"Cut at {limit} {unit}: {_lower(_ahead(race, race_pairs(race, axis)))}"))
    if race.metric_pairs:
        found.append(Finding("On test data?", _ahead(race, race.metric_pairs)))
    found.append(Finding("Did all train stably?", _stability(race)))
    if widths := _widths(race):
        found.append(Finding("How sensitive are they to the rate?", _sensitivity(race, widths)))
    if flat := _flatness(race):
        found.append(Finding("Do they end at flatter points?", flat))
    found.append(Finding("What may be believed?", _belief(race)))
    return tuple(found)


def _lower(text: str) -> str:
    return text if text.split()[0].strip(".,:") not in ("Undecided", "Nobody") else text[0].lower() + text[1:]


def _ahead(race: Race, pairs: Sequence[RacePair]) -> str:
    leaders = race.leaders(tuple(pairs))
    others = [name for name in race.raced() if name not in leaders]
    decided = sum(p.verdict != "undecided" for p in pairs)
    counted = f"{count(decided)} of {count(len(pairs))} pairs are decided"
    if len(leaders) == 1 and others:
        beaten = _count(pairs, leaders[0], "ahead")
        of = "all others" if beaten == len(others) else f"{count(beaten)} of {count(len(others))}, and nobody of it"
        return f"{leaders[0]} is ahead of {of}; {counted}."
    if not others:
        text = f"Undecided: the tests tell none of {count(len(leaders))} behind another."
        return f"{text} {_power(race, pairs)}" if pairs else "There is nobody to compare with."
    if len(leaders) > len(others):
        return f"Undecided but for {_list(others)}, which {'is' if len(others) == 1 else 'are'} behind. {counted}."
    return f"Undecided among {_list(leaders)}; all others are behind one of them. {counted}."


def _power(race: Race, pairs: Sequence[RacePair]) -> str:
    ratio = least_ratio(race.seeds, len(pairs), race.level)
    if not math.isfinite(ratio):
        return "One seed decides nothing."
    text = f"With {count(race.seeds)} seeds the first of {count(len(pairs))} pairs must differ by {number(ratio, 2)} "
    more = next((n for n in range(race.seeds, 60) if least_ratio(n, len(pairs), race.level) < 6), None)
    return f"{text}standard errors" + (f"; from {count(more)} seeds on by fewer than 6." if more and ratio > 6 else ".")


def _stability(race: Race) -> str:
    lost = [(name, race.diverged(name)) for name in race.raced() if race.diverged(name) > 0]
    if not lost:
        return f"Yes: none of {count(_trainings(race))} trainings diverged at the rates they raced with."
    said = ", ".join(
        f"{name} in {count(round(s * len(race.of(name))))} of {count(len(race.of(name)))}" for name, s in lost
    )
    return f"No: {said} seeds. A training that diverged is behind all others of its seed."


def _widths(race: Race) -> dict[str, float]:
    found = {name: race.range_kept(name) for name in race.raced()}
    return {name: high / low for name, (low, high, _) in found.items() if math.isfinite(low) and low > 0}


def _sensitivity(race: Race, widths: dict[str, float]) -> str:
    def factor(name: str) -> str:
        return f"{'at least ' * race.range_kept(name)[2]}{number(max(1.0, widths[name]), 2)}"

    order = sorted(widths, key=lambda name: -widths[name])
    most, least = order[0], order[-1]
    text = (
        f"In the first round of the searches rates over a factor of {factor(most)} keep nine tenths of the best fall "
        f"for {most}, the most forgiving"
    )
    if least != most:
        text += f", over one of {factor(least)} for {least}, the least"
    return f"{text}; rates tried are a factor of 3.2 apart."


def _flatness(race: Race) -> str:
    names = [n for n in race.raced() if math.isfinite(race.final(n, "top_eigenvalue").value)]
    if len(names) < 2:
        return ""
    order = sorted(names, key=lambda n: race.final(n, "top_eigenvalue").value)
    low, high = (race.final(n, "top_eigenvalue") for n in (order[0], order[-1]))
    pairs = race_pairs(race, "top_eigenvalue")
    decided = sum(p.verdict != "undecided" for p in pairs)
    return (
        f"{order[0]} ends flattest, with a largest eigenvalue of {quantity(low, 3)}, {order[-1]} sharpest, with "
        f"{quantity(high, 3)} (means over seeds); {count(decided)} of {count(len(pairs))} pairs are told apart. A "
        "classifier with a smaller loss has smaller curvature by itself."
    )


def _belief(race: Race) -> str:
    said = []
    if race.unit == "steps":
        said.append("The order holds at equal steps, not at equal time: see the same at equal seconds and gradients.")
    if race.unit == "seconds":
        said.append("The order is that of this machine and its load at the time.")
    if any(e.source == "default" for e in race.entrants):
        said.append("Rates are usual ones, not searched: an optimizer that is behind may only have the wrong rate.")
    else:
        said.append("Only rates were searched: other settings are each optimizer's own.")
    said.append("What holds on this task need not hold on larger ones.")
    units = [c.seconds_per_gradient for n in race.raced() for c in race.of(n) if math.isfinite(c.seconds_per_gradient)]
    if units:
        low, high = min(units), max(units)
        said.append(
            f"A gradient took {wording.duration(low)} to {wording.duration(high)} over the trainings: seconds are no "
            "surer than that."
        )
    return " ".join(said)


def _list(names: Sequence[str]) -> str:
    names = list(names)
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names) or "none"


# -- tables -----------------------------------------------------------------------------------------------------------


def tables_of(race: Race) -> tuple[Table, Table, Table, tuple[Table, ...]]:
    """Return the standings, the same at equal amounts, costs, and the first against each other."""
    return _standings(race), _equal(race), _costs(race), _first(race)


def _standings(race: Race) -> Table:
    columns = ["optimizer", "rate", "training loss", *([race.metric] if race.metric else []), "diverged"]
    columns += ["ahead of", "behind", "loss over the budget"]
    rows = list[tuple[str, ...]]()
    for name in race.raced():
        ahead, behind = (_count(race.pairs, name, verdict) for verdict in ("ahead", "behind"))
        cells = [name, _rate(race, name), quantity(race.final(name), 3)]
        if race.metric:
            cells.append(f"{_metric(race, name)} {_metric_error(race, name)}".strip())
        cells += [f"{round(100 * race.diverged(name))}{THIN}%", count(ahead), count(behind), _spark(race, name)]
        rows.append(tuple(cells))
    empty = ("",) * (len(columns) - 2)
    rows += [(e.name, "did not race", *empty) for e in race.entrants if e.name not in race.raced()]
    mean = "geometric means" if race.scale == "log" else "means"
    caption = (
        f"At the end of {count(race.budget)} {race.unit}, best first: {mean} over {count(race.seeds)} seeds with one "
        "standard error, seeds that diverged left out. Ahead of, behind: of how many others, beyond chance."
    )
    return Table(caption=caption, columns=tuple(columns), rows=tuple(rows), num_prose=1)


def _rate(race: Race, name: str) -> str:
    entrant = race[name]
    if not math.isfinite(entrant.lr):
        return "own"
    return number(entrant.lr, 2) + {"given": " (given)", "default": " (usual)"}.get(entrant.source, "")


def _count(pairs: Sequence[RacePair], name: str, verdict: str) -> int:
    other = {"ahead": "behind", "behind": "ahead"}[verdict]
    return sum((p.first == name and p.verdict == verdict) or (p.second == name and p.verdict == other) for p in pairs)


def _spark(race: Race, name: str) -> str:
    courses = [c for c in race.of(name) if c.finished][:1]
    if not courses:
        return ""
    every = courses[0].points[-16:]
    values = [math.log(max(p.loss, race.floor)) if race.scale == "log" else p.loss for p in every]
    return wording.sparkline(values)


def _equal(race: Race) -> Table:
    axes: list[Axis] = [a for a in ("steps", "seconds", "gradients") if math.isfinite(race.common(a))]
    columns = ["optimizer"]
    for axis in axes:
        unit = {"seconds": "s"}.get(axis, axis)
        columns += [f"at {_amount(race.common(axis))} {unit}", "rank"]
    ends = {axis: {name: _last(race.at(name, axis).value) for name in race.raced()} for axis in axes}
    ranks = {axis: sorted(at, key=at.__getitem__) for axis, at in ends.items()}
    rows = []
    for name in race.raced():
        cells = [name]
        for axis in axes:
            value = race.at(name, axis)
            known = math.isfinite(value.value)
            cells += [quantity(value, 3) if known else "", count(1 + ranks[axis].index(name)) if known else ""]
        rows.append(tuple(cells))
    caption = "Training loss where the entrant that was through first had ended, by steps, seconds and gradients."
    return Table(caption=caption, columns=tuple(columns), rows=tuple(rows))


def _amount(value: float) -> str:
    return count(value) if value == round(value) else number(value, 3)


def _last(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _costs(race: Race) -> Table:
    rows = list[tuple[str, ...]]()
    for name in race.raced():
        entrant, own = race[name], [c for c in race.of(name) if c.points and c.end.steps]
        steps = sum(c.end.steps for c in own)
        unit = _middle([c.seconds_per_gradient for c in own])
        each = sum(c.end.seconds for c in own) / steps if steps else math.nan
        searches = [c for c in race.searches(name) if c.points]
        low, high, _ = race.range_kept(name)
        rows.append(
            (
                name,
                _known(entrant.evaluations_per_step),
                _known(entrant.gradients_per_step),
                _known(each / unit if unit else math.nan),
                count(len(searches)),
                _known(sum(c.share for c in searches)),
                wording.duration(_seconds(race, searching=True, name=name)) if searches else "",
                f"{number(low, 2)} to {number(high, 2)}" if math.isfinite(low) else "",
            )
        )
    columns: tuple[str, ...] = ("optimizer", "losses a step", "gradients a step", "time a step, in gradients")
    columns += ("searches", "in budgets", "in seconds", "rates that keep 9/10")
    caption = (
        "What steps cost, and what the searches did, which no budget contains. Time a step is in gradients of the same "
        "batch timed in the same process, and holds the optimizer's own arithmetic."
    )
    return Table(caption=caption, columns=columns, rows=tuple(rows), on_screen=True)


def _middle(values: list[float]) -> float:
    kept = sorted(v for v in values if math.isfinite(v))
    return kept[len(kept) // 2] if kept else math.nan


def _known(value: float) -> str:
    return number(value, 2) if math.isfinite(value) else ""


def _first(race: Race) -> tuple[Table, ...]:
    names = race.raced()
    order = {name: i for i, name in enumerate(names)}
    pairs = [p for p in race.pairs if names[0] in (p.first, p.second)]
    if not pairs:
        return ()
    pairs.sort(key=lambda p: order[p.second if p.first == names[0] else p.first])
    what = "ratio of losses" if race.scale == "log" else "difference"
    caption = f"{names[0]}, the first, against each other; p-values are those before the correction for all pairs."
    columns = ("against", what, "test", "p", "")
    rows = tuple(_pair(race, p, names[0]) for p in pairs)
    return (Table(caption=caption, columns=columns, rows=rows, num_prose=1, on_screen=False),)


def _pair(race: Race, pair: RacePair, name: str) -> tuple[str, ...]:
    swap = pair.second == name
    difference = -pair.difference if swap else pair.difference
    if not math.isfinite(difference):
        size = "diverged" if difference < 0 else ""
    elif race.scale == "log":
        size = f"{TIMES} {number(math.exp(difference), 3)}"
    else:
        size = number(difference, 3)
    verdict = {"ahead": "behind", "behind": "ahead"}.get(pair.verdict, pair.verdict) if swap else pair.verdict
    p = "< 10⁻⁶" if pair.p < 1e-6 else number(pair.p, 2)
    return pair.first if swap else pair.second, size, pair.test, p, verdict
