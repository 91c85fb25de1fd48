"""What a slide is, in a few lines (`lgd info SLIDE`); never what a scanner noted of it or of a patient."""

from pydantic import JsonValue

from lgd.base.errors import require
from lgd.io.location import as_output_location
from lgd.slides.openslide_file import is_named_like_slide, looks_like_slide
from lgd.slides.preview import draw_preview, save_preview
from lgd.slides.slide import open_slide
from lgd.slides.tissue_mask import find_tissue


def is_meant_as_slide(text: str) -> bool:
    """Whether a user names a slide, or a file that is called like one."""
    return is_named_like_slide(text) or looks_like_slide(text)


def describe_slide(text: str, mpp: float | None = None, preview: str = "") -> dict[str, JsonValue]:
    """What a slide is; `preview` is where a PNG of it and its tissue goes, if anywhere.

    Raises `DataError` for what is no slide, is damaged or has no scale, and `ConfigError` for a preview of another name
    than that of a PNG.
    """
    require(not preview or preview.lower().endswith(".png"), f"--preview is {preview}: give a name that ends in .png")
    with open_slide(text, mpp) as slide:
        tissue = find_tissue(slide)
        if preview:
            save_preview(draw_preview(slide, tissue), as_output_location(preview, "--preview"))
    wide, high = (f"{side * slide.mpp / 1000:.1f}" for side in (slide.width, slide.height))
    facts: dict[str, JsonValue] = {"kind": "slide", "file": text, "vendor": slide.vendor}
    facts["size"] = f"{slide.width} x {slide.height} px, {wide} x {high} mm"
    if slide.bounds[2:] != (slide.width, slide.height):
        x, y, width, height = slide.bounds
        facts["scanned"] = f"{width} x {height} px, from {x}, {y} on"
    return facts | {
        "um_per_px": round(slide.mpp, 5),
        "levels": ", ".join(f"1:{level.downsample:g}" for level in slide.levels),
        "tissue_mm2": round(tissue.area_mm2, 3),
        "pen_share": round(tissue.pen, 3),
        "blurred_share": round(tissue.blurred, 3),
        "notes": "; ".join([*slide.notes, *tissue.notes]) or None,
    }
