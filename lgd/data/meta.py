"""KEY.json: the facts of one sample, as they are stored beside its images. Nothing in it is trusted."""

import json
import re
from typing import Any

from lgd.config import LEVEL_NAMES

FIELDS: dict[str, tuple[type, ...]] = {
    "key": (str,),
    "level": (int, type(None)),
    "level_name": (str, type(None)),
    "slide": (str, type(None)),
    "group": (str,),
    "split": (str,),
    "source": (str,),
    "width": (int,),
    "height": (int,),
    "mpp": (float, int, type(None)),
    "sha256": (dict,),
}
"""The fields of KEY.json, and the types of each."""


_KEY = re.compile(r"[A-Za-z0-9_+-]{1,90}")
# Escapes for terminals, line breaks, and halves of letters that cannot be written to any file.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_LEVELS = frozenset({(None, None), *enumerate(LEVEL_NAMES)})


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse)


def parse_meta(content: Any, split: str) -> tuple[dict[str, Any], str]:
    """A KEY.json of a shard of `split`, and what is wrong with it, or nothing.

    Where the key itself is bad, the document comes back empty.
    """
    try:
        meta = _JSON.decode(str(content, "utf-8"))
    except (ValueError, RecursionError) as error:
        return {}, f"no valid JSON ({error})"
    if type(meta) is not dict or type(meta.get("key")) is not str or not _KEY.fullmatch(meta["key"]):
        return {}, "has no key of letters, digits, _, + and -"
    for name, kinds in FIELDS.items():
        # Not isinstance: True is an int.
        if type(meta.get(name, FIELDS)) not in kinds:
            return meta, f"field {name} is {meta[name]!r:.80}" if name in meta else f"field {name} is missing"
    for name in ("slide", "group", "source"):
        if UNPRINTABLE.search(meta[name] or ""):
            return meta, f"field {name} is {meta[name]!r:.80}, which cannot be printed"
    if (meta["level"], meta["level_name"]) not in _LEVELS:
        return meta, f"fields level and level_name are {meta['level']!r:.80} and {meta['level_name']!r:.80}"
    if meta["split"] != split:
        return meta, f"field split is {meta['split']!r:.80}, but the shard is of {split}"
    if meta["slide"] is not None and meta["group"] != meta["slide"]:
        return meta, f"fields slide and group are {meta['slide']!r:.80} and {meta['group']!r:.80}"
    if meta["mpp"] is not None and not 0 < meta["mpp"] < 100:
        return meta, f"field mpp is {meta['mpp']!r:.80}"
    return meta, ""
