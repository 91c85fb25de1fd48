"""The model card, `README.md` in a student's folder, in the form of the Hugging Face hub.

`lgd train` writes it when a student is finished, without results, and `lgd evaluate` anew for a student that its run
trained, with the report's headline, caveats and command. A student of another run keeps its card. The last line is a
digest of the rest: a card that somebody changed is never replaced.
"""

import hashlib
import logging
import re
from collections.abc import Sequence

from lgd.base.errors import DataError
from lgd.base.markup import escape_markdown
from lgd.base.plain_yaml import write_yaml
from lgd.config import Config
from lgd.io.files import exists, read_bytes, write_bytes
from lgd.io.location import as_location
from lgd.models.pretrained import is_hub, split_hub
from lgd.report.card_facts import CardFacts, Part, gather_facts, make_tag
from lgd.report.card_sections import (
    caveats_section,
    data_section,
    licence_section,
    method_section,
    prediction_section,
    provenance_section,
    results_section,
    teachers_section,
    usage_section,
    use_section,
)
from lgd.report.checklist import checklist_section
from lgd.report.results import Results
from lgd.runs.folder import find_training
from lgd.scoring.notes import VIRTUAL
from lgd.shards.shard_set import ShardSet

logger = logging.getLogger(__name__)

CARD = "README.md"
_MARK = re.compile(rb"<!-- lgd model card ([0-9a-f]{64}) -->\n")
_RESEARCH = "It is for research, and not for diagnosis."
# As the hub calls them; what else is stated has conditions, or is no licence of these.
_LICENCES = """
apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-nc-nd-4.0 gpl-3.0
""".split()


def write_card(config: Config, shards: ShardSet, results: Results | None = None) -> None:
    """Write the card of a run's student: with `results` anew, else unless there is one of this very training.

    A folder that cannot be read or written has a warning, and no error.
    """
    path = as_location(config.student.dir) / CARD
    try:
        facts = gather_facts(config, shards, results)
        digests = facts.config.weights_sha256, facts.config.inputs
        if results is not None and find_training(config, facts.config.weights_sha256) is None:
            logger.info("[card] left as it is, since this run did not train the student: %s", path)
            return
        before = read_bytes(path) if exists(path) else b""
        if results is None and all(digest.encode() in before for digest in digests):
            return
        if before and not is_untouched(before):
            logger.warning("[card] %s is not as lgd wrote it, and is left as it is: move it away for a new one", path)
        else:
            write_bytes(path, seal(make_card(facts)))
    except (DataError, OSError) as error:
        logger.warning("[card] %s was not written: %s", path, error)


def seal(text: str) -> bytes:
    """A card with the line that tells whether it was changed since."""
    content = text.encode()
    return content + f"<!-- lgd model card {hashlib.sha256(content).hexdigest()} -->\n".encode()


def is_untouched(content: bytes) -> bool:
    """Whether a card is as `seal` made it."""
    text, _, last = content[:-1].rpartition(b"\n")
    mark = _MARK.fullmatch(last + b"\n")
    return mark is not None and hashlib.sha256(text + b"\n").hexdigest().encode() == mark[1]


def make_card(facts: CardFacts) -> str:
    """The whole card but for its last line."""
    target = facts.target
    title = f"{target.name} from H&E: {facts.title}"
    sentence = f"Predicts {target.name} ({target.describe_labels()}) of H&E patches"
    if not facts.config.training.labelled:
        sentence = "Hallucinates latents of a second stain from H&E patches; no label taught it"
    lines = [
        f"---\n{write_yaml(make_head(facts))}---\n",
        f"# {escape_markdown(title)}\n",
        f"{escape_markdown(sentence)}. {_RESEARCH}\n",
        *([f"**Trained on virtual tissue alone**: {VIRTUAL}.\n"] if facts.config.training.virtual else []),
        *results_section(facts),
        *prediction_section(facts),
        *use_section(facts),
        *usage_section(facts),
        *data_section(facts),
        *teachers_section(facts),
        *licence_section(facts.list_parts()),
        *method_section(facts),
        *caveats_section(facts),
        *provenance_section(facts),
        *checklist_section(facts),
    ]
    return "\n".join(lines)


def make_head(facts: CardFacts) -> dict[str, object]:
    """The metadata that the hub reads."""
    config, target = facts.config, facts.target
    names = dict.fromkeys(one.name for one in (config.morphology, config.hallucination) if one and is_hub(one.name))
    bases = [split_hub(name)[0] for name in names]
    tags = ["lgd", "pathology", "histopathology", "hematoxylin-and-eosin", make_tag(target.name)]
    tags += ["virtual-tissue"] if config.training.virtual else []
    classifies = config.training.labelled and not target.is_number
    return {
        "library_name": "lgd",
        **state_licence(facts.list_parts()),
        **({"pipeline_tag": "image-classification"} if classifies else {}),
        **({"base_model": bases[0] if len(bases) == 1 else bases} if bases else {}),
        "tags": [*filter(None, dict.fromkeys(tags))],
    }


def state_licence(parts: Sequence[Part]) -> dict[str, str]:
    """The licence as the hub has it: one where every part states that one, else `other` and why."""
    terms = {(one.licence or "").lower().replace(" ", "-") for one in parts}
    if len(terms) == 1 and (only := next(iter(terms))) in _LICENCES:
        return {"license": only}
    return {"license": "other", "license_name": "not-stated-for-all-parts" if "" in terms else "terms-of-its-parts"}
