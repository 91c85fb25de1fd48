"""`targets`: what the domain targets of native pairs cost, against the first edition's code, on one core.

A is `nuclei_grid` and `membrane_grid`, B the same functions of the first edition (`tools.bench.first_targets`); the
ratio is of the processor's time. Both get the decoded images of a pair, as caching gives them.
"""

from dataclasses import replace

import torch

from lgd.shards.image import decode
from lgd.stain.targets import membrane_grid, nuclei_grid
from tools.bench import first_targets
from tools.bench.inputs import Inputs
from tools.bench.measure import Outcome, Rate, Settings, compare, taking_turns

MARK = 0.35
_PAIRS, _TURNS = 2, 5
"""Pairs of a call, and calls of a round."""
_GRIDS = {"nuclei": 8, "membrane": 4}
"""As `latents:` of a run has them."""


def run(settings: Settings, inputs: Inputs) -> Outcome:
    """Milliseconds of a core a pair by those of the first edition."""
    pairs = [
        [torch.from_numpy(decode(path.read_bytes(), path.name, None))[None].permute(0, 3, 1, 2) for path in p.images]
        for p in inputs.pairs[:_PAIRS]
    ]

    def ours() -> list[torch.Tensor]:
        nuclei = [nuclei_grid(he, _GRIDS["nuclei"], None) for he, _ in pairs]
        return nuclei + [membrane_grid(ihc, _GRIDS["membrane"], None) for _, ihc in pairs]

    def first() -> list[torch.Tensor]:
        nuclei = [first_targets.nuclei_grid(he, _GRIDS["nuclei"], None) for he, _ in pairs]
        return nuclei + [first_targets.membrane_grid(ihc, _GRIDS["membrane"], None) for _, ihc in pairs]

    # Of the last call before the rounds, which warms both up.
    difference = max(float((a - b).abs().max()) for a, b in zip(ours(), first(), strict=True))

    def in_turn() -> tuple[Rate, Rate]:
        one, other = taking_turns(first, ours, len(pairs), _TURNS)
        return one._replace(seconds=one.cpu), other._replace(seconds=other.cpu)

    compared = "core-ms of nuclei and membranes of native pairs / the first edition's code"
    measured = compare("targets", compared, MARK, in_turn, settings.rounds)
    facts = {**inputs.described(), "largest_difference": difference}
    return Outcome(ratios=[replace(measured, at_most=True)], facts=facts)
