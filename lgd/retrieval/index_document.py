"""index.json: what an index is and reached, its files, and what it is of."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from lgd.base.records import Count, Many, Record, Sha256, Xxh3
from lgd.io.documents import Document
from lgd.retrieval.index_files import cells_of
from lgd.shards.manifest import Text, Word

REMEDY = "run lgd build-index"


class IndexFile(Record):
    """A file of the index, named by its digest."""

    bytes: Annotated[int, Field(ge=1, lt=2**53)]
    xxh3: Xxh3


class BiasSource(Record):
    """What the bias of an index against hubs is learnt from (`lgd.retrieval.bias`)."""

    sharpness: Annotated[float, Field(gt=0)]
    """latents.bias."""
    student: Sha256
    """Weights of the student that saw the H&E."""
    split: Word
    shards: Annotated[Many[Sha256], Field(min_length=1)]
    """Of the H&E."""


class IndexRequest(Record):
    """What an index is asked to be."""

    asked: Text
    """latents.index."""
    gallery: Many[Word]
    target: Annotated[float, Field(gt=0, le=1)]
    """latents.recall."""
    components: Count
    """latents.components."""
    bias: BiasSource | None
    """None of an index without one."""
    parts: Annotated[Many[Sha256], Field(min_length=1)]
    """Digest of each of the parts that are indexed."""


class IndexDocument(Document, IndexRequest):
    """index.json."""

    FORMAT: ClassVar[str] = "lgd-index/5"
    ABSENT: ClassVar[str] = f"there is no index; {REMEDY}"
    REMEDY: ClassVar[str] = REMEDY

    factory: Text
    nprobe: Count
    rows: Annotated[int, Field(ge=1, lt=2**40)]
    dim: Annotated[int, Field(ge=1, lt=2**20)]
    """Length of the vectors that are compared."""
    latent_dim: Annotated[int, Field(ge=1, lt=2**20)]
    """Length of the latents that are whitened to these."""
    why: Text
    trained_on: Count
    seconds: dict[Text, float]
    recall_at_10: Annotated[float, Field(ge=0, le=1)]
    queries: Text
    faiss: IndexFile
    table: IndexFile
    whitening: IndexFile | None

    @property
    def width(self) -> int:
        """Length of the indexed vectors, which the bias makes longer by one."""
        return self.dim + (self.bias is not None)

    @model_validator(mode="after")
    def _check_probes(self) -> Self:
        cells = cells_of(self.factory)
        if not min(1, cells) <= self.nprobe <= cells:
            raise ValueError(f"field nprobe is {self.nprobe}, and {self.factory} has {cells} cells")
        return self

    @model_validator(mode="after")
    def _check_whitening(self) -> Self:
        # Of latents that do not vary along so many there are fewer.
        dims = range(1, min(self.components, self.latent_dim) + 1) if self.whitening else (self.latent_dim,)
        if (self.whitening is None) != (self.components == 0) or self.dim not in dims:
            raise ValueError(f"field dim is {self.dim}, and {self.components} components are of {self.latent_dim}")
        return self
