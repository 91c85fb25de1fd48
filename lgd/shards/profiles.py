"""Colour profiles (ICC) that images carry: named and compared, not applied."""

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageCms

_MOST = 5


class Profile(NamedTuple):
    """A colour profile in a file."""

    sha256: str
    name: str
    """What it calls itself."""


def find_profile(image: Image.Image) -> Profile | None:
    """The ICC profile of an image, the same in every container; None where there is none."""
    content = image.info.get("icc_profile")
    if not content:
        return None
    name = "of an unknown name"
    with contextlib.suppress(Exception):
        name = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(content))).strip()[:80] or name
    return Profile(hashlib.sha256(content).hexdigest(), name)


def describe_profiles(profiles: Sequence[Profile | None], what: str) -> str:
    """One sentence where the profiles of images differ; else nothing. `what` names the images."""
    counts = Counter(profiles).most_common()
    if len(counts) < 2:
        return ""
    names = Counter(profile.name for profile, _ in counts if profile)
    shown = []
    for profile, count in counts[:_MOST]:
        # Two scanners may call theirs alike.
        digest = f" ({profile.sha256[:8]})" if profile and names[profile.name] > 1 else ""
        shown.append(f"{count} {profile.name!r}{digest}" if profile else f"{count} none")
    more = f" and {len(counts) - _MOST} more" if len(counts) > _MOST else ""
    return (
        f"{len(profiles)} {what} carry different colour profiles, {', '.join(shown)}{more}: their colours are read as "
        "they are stored, so equal stains may look unlike"
    )
