"""Which metrics of a target stand where in a report, and what they are called there."""

from lgd.labels.measures import Measures


def name_briefly(measures: Measures, name: str) -> str:
    """A metric of the headline, as running text and narrow tables call it."""
    return name if name == "kappa" else measures.headline[name]


def list_first(measures: Measures) -> tuple[str, ...]:
    """Those of the shortest tables."""
    return (*measures.headline,)[:3]


def list_compared(measures: Measures) -> dict[str, str]:
    """Those by which methods are compared, with their names."""
    names = (*measures.choices, *measures.ranked)
    return {name: measures.headline[name] for name in names if name in measures.headline}


def list_robust(measures: Measures) -> tuple[str, ...]:
    """Those of changed images."""
    return tuple(name for name in measures.headline if name != "within_one")


def list_drawn(measures: Measures) -> tuple[str, str]:
    """Of these the two that are drawn."""
    return ("mae", "pearson") if measures.target.is_number else ("accuracy", "ece")


def explain_direction(measures: Measures) -> str:
    """Of which metrics of the headline the lower one is better, as a sentence."""
    names = [title for name, title in measures.headline.items() if name in measures.lower_is_better]
    return f"Of {' and '.join(names)}, lower is better."
