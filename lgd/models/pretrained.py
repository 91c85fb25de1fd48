"""A pretrained encoder as files: a folder, or a repository of the hub copied into one; nothing in it is run.

`config.json` names the architecture, `preprocessor_config.json` the normalisation, and `model.safetensors`, whole or
in shards with an index, has the weights. All are read here; transformers is given what passed.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from lgd.base.records import Record, load_json
from lgd.models.spec import Mean, Std, Triple, check_architecture, check_sizes, refuse_code

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Labels of 21,841 classes take 2 MB; parsed, JSON takes up to 20 times its size.
_MOST_BYTES = 4_000_000
_SHARD = r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$"
# Fields of other programs may hold anything and are not used; these are checked before transformers is imported.
_SIZES = re.compile(r"(sizes?|dim|layers|depths?|blocks|stages|levels|heads|channels|ratios?)$")

_HUB = ("hf:", "timm:hf-hub:")
_AGAIN = "copy the encoder again, whole"
_NO_WEIGHTS = (
    f"{WEIGHTS} is missing: copy it too; weights of another format can run code and are never read: convert them where "
    "you trust them (in transformers: from_pretrained, then save_pretrained; in timm: create_model, then save_for_hf "
    "with safe_serialization=True), and name the folder"
)
NORMALISE = (
    'copy it from where the encoder was published, or write what was published, such as {"image_mean": [0.485, 0.456, '
    '0.406], "image_std": [0.229, 0.224, 0.225]}; or state mean and std beside the encoder in the config of the run'
)


class _Processor(Record):
    model_config = ConfigDict(extra="ignore")
    image_mean: Mean
    image_std: Std
    do_normalize: bool = True
    # Images are scaled by 1/255 here, whatever the encoder.
    do_rescale: Literal[True] = True
    rescale_factor: Annotated[float, Field(ge=0.00392, le=0.00393)] = 1 / 255


class _Index(Record):
    model_config = ConfigDict(extra="ignore")
    weight_map: Annotated[dict[str, Annotated[str, Field(pattern=_SHARD)]], Field(min_length=1)]


def is_hub(name: str) -> bool:
    """Whether a name is that of a repository of the hub."""
    return name.startswith(_HUB)


def split_hub(name: str) -> tuple[str, str | None]:
    """The repository and the revision of `hf:ORG/NAME@REV` or `timm:hf-hub:ORG/NAME@REV`."""
    prefix = next(one for one in _HUB if name.startswith(one))
    repository, _, revision = name.removeprefix(prefix).partition("@")
    return repository, revision or None


def describe_hub() -> str:
    """How the hub is reached from here."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "offline (HF_HUB_OFFLINE): what is in the cache, and nothing else"
    token = "a token is set" if huggingface_hub.get_token() else "no token (HF_TOKEN): gated encoders cannot be had"
    return f"{constants.ENDPOINT}, {token}"


def check_hub(name: str) -> None:
    """`ValueError` where the weights of a repository of the hub cannot be had; they are not copied for it."""
    import huggingface_hub
    from huggingface_hub import constants

    repository, revision = split_hub(name)
    try:
        found = [huggingface_hub.try_to_load_from_cache(repository, one, revision=revision) for one in (WEIGHTS, INDEX)]
        # A copy does without the hub, which may be out of reach.
        if any(isinstance(one, str) for one in found):
            return
        if constants.HF_HUB_OFFLINE:
            find_weights(find_folder(name, weights=True))
        elif not any(huggingface_hub.file_exists(repository, file, revision=revision) for file in (WEIGHTS, INDEX)):
            raise ValueError(_NO_WEIGHTS)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(_explain_hub(error, repository)) from error


def find_folder(name: str, *, weights: bool = False) -> Path:
    """The folder of a local encoder, or the copy of a hub repository with its descriptions or its weights too."""
    if not is_hub(name):
        return Path(name)
    import huggingface_hub

    (repository, revision), files = split_hub(name), [CONFIG, PROCESSOR]
    if weights:
        files += [WEIGHTS, INDEX, "model-*-of-*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=files))
    # Its errors come from three packages, which change with its version.
    except Exception as error:
        raise ValueError(_explain_hub(error, repository)) from error


def _explain_hub(error: Exception, repository: str) -> str:
    from huggingface_hub import errors

    offline = "or name a folder that holds a copy of it"
    if isinstance(error, errors.HFValidationError):
        return "this is no name of a repository of the hub: use hf:ORG/NAME"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its terms at huggingface.co/{repository}, and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub knows no such repository: check the name, and set HF_TOKEN where it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub knows no such revision of it: check what stands after @"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return f"the hub cannot be reached, and the cache lacks it: connect and unset HF_HUB_OFFLINE, {offline}"
    return f"it cannot be copied from the hub ({shorten(error)}): try again, {offline}"


def read_settings(folder: Path) -> dict[str, object]:
    """The fields of `config.json`; `ValueError` for code, an unknown architecture and an absurd network."""
    settings = read_object(folder / CONFIG, _AGAIN)
    with _naming(CONFIG):
        refuse_code(settings)
        if "quantization_config" in settings:
            raise ValueError("field 'quantization_config': the weights are quantised: use those of 16 bits or more")
        check_architecture(settings)
        check_sizes({field: value for field, value in settings.items() if _SIZES.search(field)})
    return settings


def read_normalisation(folder: Path) -> tuple[Triple, Triple]:
    """Mean and standard deviation, by channel of RGB in 0..1, that an encoder was trained with."""
    said = read_object(folder / PROCESSOR, NORMALISE)
    with _naming(PROCESSOR, NORMALISE):
        refuse_code(said)
        processor = _Processor.from_json(said)
    if not processor.do_normalize:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return processor.image_mean, processor.image_std


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files of a folder; `ValueError` where it has none, or an index leads elsewhere."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(_NO_WEIGHTS)
    found = read_object(folder / INDEX, _AGAIN)
    with _naming(INDEX, f"it may name safetensors files of the folder only: {_AGAIN}"):
        index = _Index.from_json(found)
    return [folder / name for name in sorted(set(index.weight_map.values()))]


@contextlib.contextmanager
def _naming(file: str, remedy: str = "") -> Iterator[None]:
    """A `ValueError` raised inside names the file, and what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(": ".join(filter(None, [file, str(error), remedy]))) from error


def shorten(error: Exception) -> str:
    """The first line of another library's error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]!s:.160}"


def read_object(path: Path, remedy: str) -> dict[str, object]:
    """A JSON object of a file; `ValueError` where it is absent, broken or far too large."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing: {remedy}")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, {_MOST_BYTES} at most: {remedy}")
    try:
        found: object = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} should be a JSON object: {remedy}")
    return found
