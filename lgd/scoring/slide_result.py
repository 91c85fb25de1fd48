"""The files of a slide whose tiles are all scored; slide.json is written last."""

from collections import Counter

import numpy as np

from lgd.base.errors import DataError
from lgd.io.location import Location
from lgd.models.description import StudentConfig
from lgd.models.methods import find_method
from lgd.scoring.heatmap import draw_heatmap
from lgd.scoring.notes import NO_LABELS, VIRTUAL
from lgd.scoring.slide_answer import SlideScore, TiledSlide, answer_slide, number_blocks
from lgd.scoring.slide_files import ScoredSlide, write_features, write_geojson, write_tiles
from lgd.scoring.slide_grids import GRIDS_FILE, write_grids
from lgd.scoring.slide_parts import read_parts
from lgd.scoring.slide_plan import SlidePlan, read_arrays
from lgd.slides.slide import Slide
from lgd.stain.checks import NEARLY_BLANK

ONE_BLOCK = "its tiles lie within one square of 1 mm, so there is no interval"
MOVED = "QuPath crops this slide to its scanned part, which begins at {}, {}: open it there with --no-crop"


def finish_slide(slide: Slide, folder: Location, plan: SlidePlan, config: StudentConfig) -> SlideScore:
    """Write what is left of a slide. Two workers may do so at a time: they write the same."""
    scored = ScoredSlide(folder, plan, read_arrays(folder, plan), config)
    score = _measure(scored)
    write_tiles(scored, folder / "tiles.csv")
    write_geojson(scored, folder / "patches.geojson")
    write_features(scored, folder / "features.h5")
    write_grids(scored, folder / GRIDS_FILE)
    draw_heatmap(slide, scored, score, folder / "heatmap.png")
    score.write(folder / "slide.json")
    return score


def _measure(scored: ScoredSlide) -> SlideScore:
    plan, config, training = scored.plan, scored.config, scored.config.training
    outputs, failed, blank, notes = [], 0, 0, Counter[str]()
    for part in read_parts(scored.folder, plan):
        blank_n = part.note_n == NEARLY_BLANK.encode()
        blank += int(blank_n.sum())
        outputs.append(np.where(blank_n[:, None], np.nan, part.output_nK))
        failed += int((part.error_n != b"").sum())
        notes.update(note.decode(errors="replace") for note in part.note_n.tolist() if note)
    if failed == plan.tiles:
        first = next(read_parts(scored.folder, plan)).error_n[0].decode(errors="replace")
        raise DataError(f"none of the {failed} tiles of {plan.slide} can be read: {first}")
    block_n = number_blocks(scored.arrays.xy_n2 + plan.side / 2, plan.inputs.mpp)
    answer = answer_slide(training.target, config.conformal, np.concatenate(outputs), block_n)
    said = [*plan.notes]
    for note, count in notes.items():
        also = ", and they do not count" if note == NEARLY_BLANK else ""
        said.append(f"{count} of {plan.tiles} tiles: {note}{also}")
    if failed:
        said.append(f"{failed} of {plan.tiles} tiles cannot be read and do not count: tiles.csv says why")
    if answer.blocks == 1:
        said.append(ONE_BLOCK)
    if plan.bounds[:2] != (0, 0):
        said.append(MOVED.format(*plan.bounds[:2]))
    if not training.labelled:
        said.append(NO_LABELS.format(training.target.label_word))
    if training.virtual:
        said.append(VIRTUAL)
    if few := config.conformal and config.conformal.explain_size("slide"):
        said.append(f"no label set: {few}")
    return SlideScore(
        **{name: getattr(plan, name) for name in TiledSlide.model_fields},
        method=find_method(config.method).title,
        target=training.target,
        virtual=training.virtual,
        answer=answer,
        tiles=plan.tiles,
        failed=failed,
        blank=blank,
        notes=tuple(said),
    )
