"""TRIPOD+AI in a model card: the items of the checklist that software can fill, and those that it leaves to people.

Items and their numbers are those of Collins et al., BMJ 2024;385:e078378 (27 items, 52 with their parts); the titles
are shortened. What is written here was measured or recorded. Where an item also asks for what no file holds, its text
ends with what people must add.
"""

from lgd.base.markup import list_items, markdown_table
from lgd.base.target import UNKNOWN
from lgd.labels.predictions import find_measures
from lgd.report.card_facts import CardFacts

TITLES = {
    "1": "title",
    "2": "abstract",
    "3a": "healthcare context and rationale",
    "3b": "target population, purpose and users",
    "3c": "known health inequalities",
    "4": "objectives",
    "5a": "sources of data",
    "5b": "dates of data",
    "6a": "setting and centers",
    "6b": "eligibility of participants",
    "6c": "treatments",
    "7": "data preparation",
    "8a": "outcome",
    "8b": "assessors of the outcome",
    "8c": "blinding of the outcome's assessment",
    "9a": "choice of predictors",
    "9b": "definition of predictors",
    "9c": "assessors of predictors",
    "10": "sample size",
    "11": "missing data",
    "12a": "how the data were used",
    "12b": "handling of predictors",
    "12c": "type of model and how it was built",
    "12d": "differences between clusters: methods",
    "12e": "measures of performance",
    "12f": "model updating: methods",
    "12g": "how predictions were calculated",
    "13": "class imbalance",
    "14": "fairness",
    "15": "output of the model",
    "16": "training versus evaluation",
    "17": "ethical approval",
    "18a": "funding",
    "18b": "conflicts of interest",
    "18c": "protocol",
    "18d": "registration",
    "18e": "data sharing",
    "18f": "code sharing",
    "19": "patient and public involvement",
    "20a": "flow of participants",
    "20b": "characteristics of participants",
    "20c": "outcome in development and evaluation",
    "21": "numbers in each analysis",
    "22": "specification of the whole model",
    "23a": "performance",
    "23b": "differences between clusters: results",
    "24": "model updating: results",
    "25": "interpretation",
    "26": "limitations",
    "27a": "poor or missing input",
    "27b": "what users must do and know",
    "27c": "next steps",
}
"""The items and what each is about, in the order of the checklist."""


def describe_items(facts: CardFacts) -> dict[str, str]:
    """Item -> its text, of those that software can fill for this student."""
    return {number: text for number, text in (_describe_data(facts) | _describe_model(facts)).items() if text}


def checklist_section(facts: CardFacts) -> list[str]:
    """The section of the card."""
    filled = describe_items(facts)
    rows = [[number, TITLES[number], filled[number]] for number in TITLES if number in filled]
    left = [f"{number} ({title})" for number, title in TITLES.items() if number not in filled]
    return [
        "## TRIPOD+AI\n",
        "The items of the TRIPOD+AI checklist (Collins et al., BMJ 2024;385:e078378) that software can fill. What was "
        "not recorded is not guessed: a text that ends with “to add” needs people too.\n",
        *markdown_table(["item", "about", "here"], rows),
        "Left to people, who know the study:\n",
        *list_items([", ".join(left)]),
        "",
    ]


def _describe_data(facts: CardFacts) -> dict[str, str]:
    """The items on participants, data and outcome."""
    config, target, results = facts.config, facts.target, facts.results
    training, word = config.training, facts.target.label_word
    counts = [
        f"{one.name}: {one.patches} patches, {one.labelled} with a {word}, of {one.groups} {facts.group_word}"
        for one in facts.splits
    ]
    total, unknown = sum(training.labels.values()), training.labels.get(UNKNOWN, 0)
    flow = f"{'; '.join(counts)}. To add: patients, and what was left out before." if counts else ""
    centers = [name for name in facts.sites.get("center", {}) if name]
    sites = (
        f"{len(centers)} centers in training: {', '.join(centers)}. To add: setting and location." if centers else ""
    )
    jitter = facts.settings.get("data.augment")
    return {
        "6a": sites,
        "7": f"H&E patches shrunk to {config.size} x {config.size} px, by antialiased filters; every file was checked "
        f"when the shards were built. Samples that training left out as unreadable: {config.skipped}."
        + (f" Augmentation: {jitter}." if jitter else "")
        + " To add: staining and scanning, and whether they were alike across groups of patients.",
        "8a": f"{target.name}, {target.kind}: {target.describe_labels()}"
        + (f", in {target.unit}" if target.unit else "")
        + ". To add: how and when it was assessed.",
        "9b": "The pixels of one H&E patch; nothing else. To add: how the tissue was chosen, stained and scanned.",
        "10": f"{total} training patches, {training.labelled} with a {word}. To add: why these are enough.",
        "11": f"{unknown} of {total} training patches have no {word}"
        + (": their second images taught the rest" if facts.teachers and unknown else "")
        + ". To add: why they have none.",
        "12a": _describe_split(facts),
        "20a": flow,
        "20c": "See the table under Training data, which has both. To add: patients and predictors." if results else "",
        "21": "; ".join(counts),
    }


def _describe_split(facts: CardFacts) -> str:
    names = [one.name for one in facts.splits]
    if not names:
        return ""
    held_out = " Temperature and label sets were fitted on val" if "val" in names else ""
    held_out += ", by which early stopping chose the weights." if facts.settings.get("train.patience") else "."
    return (
        f"Partitioned by {facts.group_word}, none of which is on two sides: {', '.join(names)}. The split train taught "
        f"the network.{held_out if 'val' in names else ''}"
    )


def _describe_model(facts: CardFacts) -> dict[str, str]:
    """The items on the model, its output and its performance."""
    config, target, results, word = facts.config, facts.target, facts.results, facts.target.label_word
    measures, scaled = find_measures(target), "" if target.is_number else ", divided by the temperature"
    labelled = results if results is not None and results.labelled else None
    by_site = [by.kind for by in labelled.sites or ()] if labelled else []
    headline = ", ".join(measures.headline.values())
    commit = facts.environment.commit if facts.environment else None
    output = "a value" + (f" in {target.unit}" if target.unit else "") if target.is_number else "a probability a class"
    answer = "" if target.is_number else "; the most probable class is the answer, without a threshold"
    sets = ""
    if config.conformal is not None:
        sets = f" Conformal label sets beside it, for a coverage of {100 * config.conformal.coverage:g} %."
    return {
        "12b": "Each channel minus its mean over its standard deviation, as stated under Method and settings.",
        "12c": f"{facts.title}: see Method and settings. Internal validation: on the split val. To add: why this one, "
        "and what else was tried.",
        "12d": f"Scores by {' and by '.join(by_site)}, each with its own intervals." if by_site else "",
        "12e": f"{headline}; 95 % intervals by {results.resamples} resamples of the groups (bootstrap)."
        if labelled and results
        else "",
        "12f": "None: what was scored are the weights of this folder." if results else "",
        "12g": f"The network's outputs{scaled}, as lgd.load_scorer and lgd predict give them for this folder; those of "
        "a slide's patches are averaged."
        if config.training.labelled
        else "",
        "13": "No method against class imbalance: each training patch is seen once an epoch, and labels weigh alike.",
        "15": f"{output.capitalize()}{answer}.{sets}" if config.training.labelled else f"No {word}: latents alone.",
        "16": "See Caveats, which name centers and scanners that only one side has. To add: setting and eligibility."
        if facts.sites
        else "",
        "18f": f"LGD {config.versions.get('lgd', '')} (Apache-2.0)" + (f", commit {commit}" if commit else "") + ".",
        "22": "config.json and model.safetensors beside this card, or an ONNX file of lgd export-onnx; for terms see "
        "Licence.",
        "23a": "See Results. To add: subgroups of patients." if labelled else "",
        "23b": f"See Results, by {' and by '.join(by_site)}." if by_site else "",
        "24": "None." if results else "",
        "26": "See Caveats, which are computed from data and scores. To add: what no file can know.",
        "27a": "lgd predict refuses images whose scale is unknown or too coarse, and notes those that are nearly blank "
        "or no H&E; it fills in nothing.",
        "27b": "Users give H&E patches or slides and, where files do not state it, their scale. To add: the expertise "
        "that users need.",
    }
