"""Store -> FAISS index over the teacher's pooled latents; the only importer of faiss.

    DIR/index/faiss.index    inner product of unit vectors, which is the cosine
    DIR/index/keys.npy       part, row, level, key and slide of each indexed vector, in the index's order
    DIR/index/index.json     the factory string, its measured recall, the store's digest; written last

The index is exact (`Flat`) up to EXACT_ROWS rows: a query of a million 512-dimensional vectors is still some
tens of milliseconds, and an exact answer needs no excuse. Beyond, it is IVF with as many probes as recall@10
against exact search asks for.
"""

import math
from typing import Any

import numpy as np

from lgd.config import DataError
from lgd.files import publish, read_json, sha256, write_json
from lgd.store.latents import Store, read_all

EXACT_ROWS = 200_000
_FORMAT = "lgd-index/2"
_HELD_OUT = 1000


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DataError("FAISS is not installed: pip install 'lgd[cpu]', or 'lgd[gpu]' on a CUDA machine") from error
    return faiss


def unit(vectors_nD: np.ndarray) -> np.ndarray:
    """Scale each vector to length 1, float32."""
    vectors_nD = np.asarray(vectors_nD, np.float32)
    return np.ascontiguousarray(vectors_nD / np.maximum(np.linalg.norm(vectors_nD, axis=1, keepdims=True), 1e-12))


def build_index(store: Store, factory: str, gallery: list[str], recall: float, seed: int) -> tuple[dict, bool]:
    """Index the gallery splits of a store; returns index.json's content and whether it was built now.

    Raises `DataError` when the gallery is empty or the index misses `recall` even with all cells probed.
    """
    folder = store.folder / "index"
    asked = {"store": store.digest, "asked": factory, "gallery": gallery, "target": recall}
    if (folder / "index.json").is_file():
        there = read_json(folder / "index.json")
        if all(there.get(name) == value for name, value in asked.items()) and not problems(store):
            return there, False
    picked = [(number, part) for number, part in enumerate(store.parts) if part.split in gallery]
    if not picked:
        splits = sorted({part.split for part in store.parts})
        raise DataError(
            f"the store {store.folder} has no split {' or '.join(gallery)} to search, only {', '.join(splits)}: "
            "set latents.gallery"
        )
    faiss = _faiss()
    parts = [part for _, part in picked]
    vectors_nD = unit(read_all(parts, "pooled")[:, 0])
    chosen = factory if factory != "auto" else _choose(len(vectors_nD))
    try:
        index = faiss.index_factory(vectors_nD.shape[1], chosen, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors_nD)
        index.add(vectors_nD)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1]
        raise DataError(
            f"latents.index {chosen!r} is no FAISS factory string for {len(vectors_nD)} vectors of length "
            f"{vectors_nD.shape[1]} ({why}): use `auto` or Flat"
        ) from error
    measured, probes = _reach_recall(faiss, index, vectors_nD, recall, chosen, seed)
    rows = [(number, row) for number, part in picked for row in range(part.rows)]
    texts = {name: read_all(parts, name) for name in ("key", "slide") if name in store.document["datasets"]}
    texts.setdefault("slide", np.zeros(len(rows), "S1"))
    levels = read_all(parts, "level") if "level" in store.document["datasets"] else -1
    fields = [("part", "<u4"), ("row", "<u4"), ("level", "i1"), *((name, t.dtype) for name, t in texts.items())]
    table = np.empty(len(rows), fields)
    table["part"], table["row"], table["level"] = [p for p, _ in rows], [r for _, r in rows], levels
    for name, text in texts.items():
        table[name] = text
    (folder / "index.json").unlink(missing_ok=True)
    with publish(folder / "keys.npy") as temporary:
        with open(temporary, "wb") as stream:
            np.save(stream, table, allow_pickle=False)
    with publish(folder / "faiss.index") as temporary:
        faiss.write_index(index, str(temporary))
    document = {
        "format": _FORMAT,
        **asked,
        "factory": chosen,
        "nprobe": probes,
        "rows": len(rows),
        "dim": vectors_nD.shape[1],
        "recall_at_10": measured,
        "sha256": {name: sha256(folder / name) for name in ("faiss.index", "keys.npy")},
    }
    write_json(folder / "index.json", document)
    return document, True


def _choose(rows: int) -> str:
    return "Flat" if rows <= EXACT_ROWS else f"IVF{int(4 * math.sqrt(rows))},Flat"


def _reach_recall(
    faiss: Any, index: Any, vectors_nD: np.ndarray, target: float, factory: str, seed: int
) -> tuple[float, int]:
    """Recall@10 against exact search, and the probes that reach the target (0 for an index without cells).

    Queries are stored vectors moved by a tenth of their length, as a hallucinated latent misses its own.
    """
    random = np.random.default_rng(seed)
    picked = random.choice(len(vectors_nD), min(_HELD_OUT, len(vectors_nD)), replace=False)
    noise = random.standard_normal((len(picked), vectors_nD.shape[1])).astype(np.float32)
    queries = unit(vectors_nD[picked] + 0.1 * unit(noise))
    exact = faiss.IndexFlatIP(vectors_nD.shape[1])
    exact.add(vectors_nD)
    k = min(10, len(vectors_nD))
    truth = exact.search(queries, k)[1]

    def recall() -> float:
        found = index.search(queries, k)[1]
        return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(truth, found, strict=True)]))

    inner = faiss.try_extract_index_ivf(index)
    if inner is None:
        measured, probes = recall(), 0
    else:
        inner.nprobe = probes = 1
        while (measured := recall()) < target and probes < inner.nlist:
            inner.nprobe = probes = min(2 * probes, inner.nlist)
    if measured < target:
        raise DataError(
            f"the index {factory} reaches recall@10 {measured:.3f}, below latents.recall {target}: choose another "
            "latents.index, or `auto`"
        )
    return measured, probes


def problems(store: Store) -> list[str]:
    """What is wrong with the index of a store; digests are checked before FAISS reads anything."""
    folder = store.folder / "index"
    if not (folder / "index.json").is_file():
        return [f"{folder} holds no index: run lgd build-index"]
    document = read_json(folder / "index.json")
    if document.get("format") != _FORMAT:
        return [f"{folder / 'index.json'} is not of format {_FORMAT}: run lgd build-index"]
    found = []
    if document["store"] != store.digest:
        found.append(f"{folder} was built from another state of the store: run lgd build-index")
    for name, digest in document["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            found.append(f"{folder / name} is missing or does not match its digest: run lgd build-index")
    return found


class Searcher:
    """An index that answers nearest-latent queries with addresses in its store."""

    def __init__(self, store: Store) -> None:
        found = problems(store)
        if found:
            raise DataError("\n".join(found))
        folder = store.folder / "index"
        self._store = store
        self.document = read_json(folder / "index.json")
        self._index = _faiss().read_index(str(folder / "faiss.index"))
        self.table = np.load(folder / "keys.npy", mmap_mode="r", allow_pickle=False)

    def search(
        self, vectors_nD: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest: cosine distance (1 - cosine) and position in `table`, both (n, k), nearest first.

        `allowed`, bool over the table, leaves rows out. A position is -1 where there are fewer than k.
        """
        k = min(k, len(self.table))
        options = {}
        if allowed is not None:
            faiss = _faiss()
            chosen = faiss.IDSelectorBatch(np.flatnonzero(allowed))
            ivf = faiss.try_extract_index_ivf(self._index)
            kind = faiss.SearchParameters if ivf is None else faiss.SearchParametersIVF
            options["params"] = kind(sel=chosen, **({} if ivf is None else {"nprobe": ivf.nprobe}))
        cosine_nk, position_nk = self._index.search(unit(vectors_nD), k, **options)
        return 1 - cosine_nk, position_nk

    def vectors(self, position_n: np.ndarray) -> np.ndarray:
        """The unit vectors (n, D) of rows of `table`."""
        rows = [(int(entry["part"]), int(entry["row"])) for entry in self.table[position_n]]
        return unit(np.stack([self._store.parts[part].array("pooled")[row, 0] for part, row in rows]))
