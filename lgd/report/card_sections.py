"""The sections of a model card, as Markdown; all text of others is escaped."""

from collections.abc import Sequence

from lgd.base.extensions import is_python
from lgd.base.markup import code_block, escape_markdown, list_items, markdown_table
from lgd.base.target import UNKNOWN
from lgd.labels.predictions import find_measures
from lgd.report.card_facts import CardFacts, Part, name_encoder
from lgd.report.results import Results, format_interval
from lgd.report.sections import tabulate_own_pairs, tabulate_scores

_USAGE = """\
## How to use it

In Python, where FOLDER is a copy of this folder:

```python
import lgd

scorer = lgd.load_scorer("FOLDER")
rows = lgd.predict(scorer, ["he.png"])
print(rows[0].label, rows[0].probabilities, rows[0].notes)
```

On a command line `lgd predict --model FOLDER he.png`, and `lgd export-onnx --model FOLDER --out model.onnx` for
programs without LGD. The folder holds weights (safetensors) and a description, and no code.
"""


def usage_section(facts: CardFacts) -> list[str]:
    """How to load it, and which code it names."""
    code = ", ".join(name for name in facts.config.named.values() if is_python(name))
    needs = f"It names code of another package, which must be installed and allowed by --code: {code}."
    return [_USAGE, *([f"{escape_markdown(needs)}\n"] if code else [])]


def results_section(facts: CardFacts) -> list[str]:
    """The scores of the report, beside those of what it was compared with; or how to get some."""
    results, word = facts.results, facts.target.label_word
    if results is None:
        asked = code_block(facts.commands["evaluate"])
        return ["## Results\n", "Not scored yet. This writes scores here, where RUN is the run's folder:\n", asked, ""]
    measures = find_measures(results.predicted)
    counts = ", ".join(f"{count} of {name}" for name, count in results.levels.items())
    scored = f"{results.patches} patches of {results.groups} slides or source patches"
    scored += f", {results.labelled} with a {word} ({counts})" if results.labelled else ", none with a label to score"
    split = results.provenance.get("split")
    lines = ["## Results\n", f"{escape_markdown(f'Split {split}: {scored}')}.\n"]
    if results.labelled:
        by_patch = [(model.name, model.by_patch) for model in results.models]
        by_slide = [(model.name, model.by_slide) for model in results.models if model.by_slide]
        lines += ["By patch; the first row is this model:\n", *tabulate_scores(by_patch, "patches", measures.headline)]
        lines += ["By slide:\n", *tabulate_scores(by_slide, "slides", measures.headline)] if by_slide else []
        lines += _list_sites(results)
    elif results.retrieval and (own := tabulate_own_pairs(results.retrieval)):
        lines += ["How well an H&E finds its own IHC:\n"]
        lines += markdown_table([*own[0]], [[*row.values()] for row in own])
    return [
        *lines,
        f"Brackets hold 95 % intervals from {results.resamples} resamples of slides or source patches. Mind the "
        "caveats below. Made by this, where RUN is the run's folder:\n",
        code_block(facts.commands["evaluate"]),
        "",
    ]


def _list_sites(results: Results) -> list[str]:
    """How this model scores the patches of each center and scanner."""
    headline, own, lines = find_measures(results.predicted).headline, results.models[0].name, list[str]()
    for by in results.sites or ():
        rows = [
            [row.site or "unknown", str(row.scored), *(format_interval(row.metrics[name]) for name in headline)]
            for row in by.rows
            if row.model == own
        ]
        lines += [f"By {by.kind}, by patch:\n", *markdown_table([by.kind, "patches", *headline.values()], rows)]
    return lines


def prediction_section(facts: CardFacts) -> list[str]:
    """What goes in, and what comes out."""
    config, target, training = facts.config, facts.target, facts.config.training
    shapes = [f"{one.width} x {one.height} px at {one.mpp or 'unknown'} um/px" for one in training.shapes[:3]]
    gives = f"a probability of each {target.label_word}, of logits divided by a temperature of {config.temperature:.3g}"
    if target.is_number:
        gives = "a value" + (f" in {target.unit}" if target.unit else "")
    if not training.labelled:
        gives = f"no {target.label_word}"
    if config.conformal is not None:
        gives += f"; label sets for a coverage of {100 * config.conformal.coverage:g} %"
    rows = [
        ["predicts", f"{target.name} ({target.kind}): {target.describe_labels()}"],
        ["gives", gives],
        ["sees", f"H&E patches, RGB, shrunk to {config.size} x {config.size} px"],
        ["patches in training", ", ".join(shapes)],
    ]
    if config.latents:
        latents = ", ".join(f"{one.dim} numbers of {name}" for name, one in config.latents.items())
        rows.append(["latents inside", latents])
    return ["## What it predicts, and from what\n", *markdown_table(["", ""], rows)]


def use_section(facts: CardFacts) -> list[str]:
    """What it is for, and what it is not."""
    no = [
        "Diagnosis, or any decision about a patient.",
        "Images of another stain, or of a scale that is not that of the training patches.",
        "Tissue, laboratories and scanners that nobody has scored it on.",
    ]
    if facts.config.training.virtual:
        no.insert(0, "Real tissue: it saw what a program drew, and nothing else.")
    yes = f"Research on what H&E tells of {facts.target.name}, by people who check it on their own slides."
    return ["## Intended use\n", f"{escape_markdown(yes)} Not for:\n", *list_items(no), ""]


def data_section(facts: CardFacts) -> list[str]:
    """What it was trained on, beside what was scored."""
    training, target, results = facts.config.training, facts.target, facts.results
    scored = {**results.levels, UNKNOWN: results.patches - results.labelled} if results else {}
    rows = [
        [name, str(count), *([str(scored.get(name, "–"))] if results else [])]
        for name, count in training.labels.items()
    ]
    lines = [
        "## Training data\n",
        *markdown_table([target.label_word, "training patches", *(["scored patches"] if results else [])], rows),
    ]
    if training.values is not None:
        ends = (training.values.least, training.values.most, training.values.mean)
        least, most, mean = map(target.format_label, ends)
        lines += [f"{escape_markdown(f'Values from {least} to {most}, {mean} in the mean')}.\n"]
    if facts.splits:
        splits = [[one.name, str(one.patches), str(one.labelled), str(one.groups)] for one in facts.splits]
        lines += markdown_table(["split", "patches", "labelled", facts.group_word], splits)
    for kind, counts in facts.sites.items():
        of = [[name or "unknown", str(count)] for name, count in sorted(counts.items())]
        lines += markdown_table([kind, "training patches that were looked at"], of)
    tissue = "virtual: drawn by a program" if training.virtual else "not drawn by lgd synth"
    facts_of = [f"Tissue: {tissue}.", *(f"Shards, by the digest of their manifest: {one}" for one in training.shards)]
    return [*lines, *list_items(facts_of), ""]


def teachers_section(facts: CardFacts) -> list[str]:
    """Where its latents come from."""
    if not facts.teachers:
        return ["## Teachers\n", "None: labels alone taught it.\n"]
    rows = []
    for one in facts.teachers:
        learnt = "not known here" if one.learnt is None else ", ".join(one.learnt) or "nothing here"
        terms = one.ref.licence or ("its own weights" if one.is_own else "not known")
        source, encoder = one.source or "not known here", one.encoder or "not known here"
        rows.append([one.ref.name, source, encoder, learnt, terms, one.ref.weights_sha256])
    head = ["teacher", "source", "encoder", "learnt", "licence", "digest of its weights"]
    return [
        "## Teachers\n",
        "They saw the second image; their latents taught this model.\n",
        *markdown_table(head, rows),
    ]


def licence_section(parts: Sequence[Part]) -> list[str]:
    """The terms of every part, and which are not known."""
    none = "none stated; its weights were random before training"
    rows = [[one.name, one.encoder, one.licence or (none if one.is_own else "not known: look it up")] for one in parts]
    unknown = ", ".join(one.name for one in parts if not one.licence and not one.is_own)
    lines = ["## Licence\n", *markdown_table(["part", "encoder", "terms"], rows)]
    if unknown:
        lines.append(f"{escape_markdown(f'Not known: the terms of {unknown}')}.\n")
    return [*lines, "Whether, and under which terms, the model may be passed on, these terms and the data's decide.\n"]


def method_section(facts: CardFacts) -> list[str]:
    """How it was trained, as far as its folder and its run record it."""
    config, sections = facts.config, dict[str, list[str]]()
    for name, value in facts.settings.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, []).append(f"{field} {value}")
    named = {"Encoder": config.morphology, "Second encoder": config.hallucination}
    items = [
        f"Method: {facts.title} ({config.method}).",
        *(
            f"{name}: {name_encoder(one)}, pooled by {one.pool}; mean {one.mean}, standard deviation {one.std} of RGB."
            for name, one in named.items()
            if one is not None
        ),
        f"Training: {config.steps} steps, {config.epochs:g} epochs; {config.engine}, workers: {config.workers}.",
        *(f"{section}: {', '.join(fields)}" for section, fields in sections.items()),
    ]
    return ["## Method and settings\n", *list_items(items), ""]


def caveats_section(facts: CardFacts) -> list[str]:
    """Those of the report."""
    caveats = facts.results.caveats if facts.results else ("Nothing is known of how good it is: it was not scored.",)
    return ["## Caveats\n", *list_items(caveats), ""]


def provenance_section(facts: CardFacts) -> list[str]:
    """Digests, versions and commands."""
    config, here = facts.config, facts.environment
    rows = [["weights (SHA-256)", config.weights_sha256], ["inputs of the training (digest)", config.inputs]]
    rows += [[name, version] for name, version in config.versions.items()]
    if here is not None:
        rows += [["commit of lgd", here.commit or "–"], ["trained on", here.device]]
    if facts.results is not None:
        scored = facts.results.provenance
        shards = scored.get("shards")
        rows.append(["scored weights (SHA-256)", str(scored.get("student"))])
        rows += [["scored shards (digest)", str(one)] for one in (shards if isinstance(shards, list) else [])]
        rows.append(["scored by", f"lgd {scored.get('lgd')}, torch {scored.get('torch')}"])
    lines = ["## Provenance\n", *markdown_table(["", ""], rows), "Trained by:\n", code_block(facts.commands["train"])]
    return [*lines, ""]
