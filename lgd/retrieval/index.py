"""Store -> FAISS index over the teacher's pooled latents (the first view), whitened: built, and its recall measured.

Run by `lgd build-index`; it leaves DIR/index/TEACHER/ as `lgd.retrieval.search` describes it, which also opens it.
"""

import functools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lgd.base.environment import measure_memory
from lgd.base.errors import DataError
from lgd.io.digests import xxh3
from lgd.io.files import list_folder, publish, remove
from lgd.io.location import Location
from lgd.io.locks import exclusive
from lgd.ray_jobs.mapping import map_with
from lgd.retrieval.bias import Bank, learn_bias
from lgd.retrieval.factory import (
    UnitVectors,
    choose_factory,
    fit_on_parts,
    measure_recall,
    move_to_gpu,
    nearest,
    train_index,
    unit,
)
from lgd.retrieval.index_files import (
    IndexDocument,
    IndexFile,
    IndexRequest,
    Whitening,
    cells_of,
    check_file,
    write_table,
)
from lgd.retrieval.search import Searcher, import_faiss, index_folder, open_index
from lgd.shards.archive import Shard
from lgd.store.parts import Part
from lgd.store.store import Store

if TYPE_CHECKING:
    from lgd.retrieval.search import Index, IndexIVF

_ALONE_ROWS = 100_000
"""Rows up to which this process finds the cells itself, whatever the workers."""
_QUERIES = 1000
_NEAREST = 10


def build_index(  # noqa: PLR0913 - the settings of an index
    store: Store,
    shards: Sequence[Shard],
    factory: str,
    gallery: list[str],
    recall: float,
    seed: int,
    workers: int = 0,
    components: int = 0,
    bank: Bank | None = None,
) -> tuple[IndexDocument, bool]:
    """Index the gallery splits of some shards; returns index.json's content and whether it was built now.

    `factory` is auto or one of `lgd.retrieval.index_files.KINDS`. Latents are whitened by `components` principal
    components of the gallery's split train, or of all of it where it has none; 0 compares them as they are. With a
    `bank` of held-out H&E each row gets a bias against hubs. The store may lie at a url. `workers` of Ray find the
    cells of the latents; 0 does it here. Raises `DataError` when the gallery is empty, and when the index misses
    `recall` even with all cells probed, and while another process builds it in a local store.
    """
    folder = index_folder(store)
    parts = list(dict.fromkeys(store.parts_of(shards)))
    indexed = [part for part in parts if part.split in gallery]
    if not indexed:
        splits = sorted({part.split for part in parts})
        raise DataError(
            f"the store {store.folder} has no split {' or '.join(gallery)} to search, only {', '.join(splits)}: "
            "set latents.gallery"
        )
    rows = sum(part.rows for part in indexed)
    if factory != "auto" and cells_of(factory) > rows:
        raise DataError(f"latents.index {factory!r} has more cells than there are latents ({rows}): use auto")
    request = IndexRequest(
        asked=factory,
        gallery=tuple(gallery),
        target=recall,
        components=components,
        bias=bank.source if bank else None,
        parts=tuple(part.digest(store.teacher) for part in indexed),
    )
    if there := _find(store, request):
        return there, False
    with exclusive(folder, "building an index"):
        if there := _find(store, request):
            return there, False
        return _publish_index(store, parts, request, seed, workers, bank), True


def _find(store: Store, request: IndexRequest) -> IndexDocument | None:
    """The index that is there, if it is whole and the one that is asked for."""
    try:
        there = open_index(store, with_faiss=False).document
    except DataError:
        return None
    return there if request.as_json().items() <= there.as_json().items() else None


def _publish_index(
    store: Store, parts: Sequence[Part], request: IndexRequest, seed: int, workers: int, bank: Bank | None
) -> IndexDocument:
    folder, factory = index_folder(store), request.asked
    gallery = [part for part in parts if part.split in request.gallery]
    taught = [part for part in gallery if part.split == "train"]
    whitening = fit_on_parts(taught or gallery, request.components)
    latents = UnitVectors(gallery, whitening)
    if bank is not None:
        bank_nD = bank.make_latents()
        bank_nD = unit(whitening.apply(bank_nD) if whitening else bank_nD)
        bias_m = learn_bias((vectors_nD for _, vectors_nD in latents.blocks()), bank_nD, bank.source.sharpness)
        latents = UnitVectors(gallery, whitening, bias_m)
    why = "as asked for"
    if factory == "auto":
        factory, why = choose_factory(latents.rows, latents.width, measure_memory())
    began = time.monotonic()
    if factory == "Flat":
        index, order_n, sampled = import_faiss().IndexFlatIP(latents.width), np.arange(latents.rows), 0
        trained = began
        for _, vectors_nD in latents.blocks():
            index.add(vectors_nD)
    else:
        index, sampled = train_index(latents, factory, seed)
        trained = time.monotonic()
        order_n = _fill(store, index, latents, workers)
    seconds = {"train": trained - began, "add": time.monotonic() - trained}
    queries_nD, described = _queries(parts, latents, request.gallery, seed)
    measured, probes = _reach_recall(index, latents, order_n, queries_nD, request.target, factory)
    kind = (factory, latents.rows, latents.width, probes)
    document = IndexDocument(
        **request.model_dump(),
        factory=factory,
        nprobe=probes,
        rows=latents.rows,
        dim=latents.dim,
        latent_dim=latents.latent_dim,
        why=why,
        recall_at_10=measured,
        queries=described,
        faiss=_publish(folder, ".faiss", lambda path: _write(index, path, kind)),
        table=_publish(folder, ".npy", lambda path: write_table(path, latents.parts, order_n)),
        whitening=_publish(folder, ".axes", functools.partial(_write_axes, whitening)) if whitening else None,
        trained_on=sampled,
        seconds=seconds,
    )
    document.write(folder / "index.json")
    # Those of the index that was there; a process that has them open keeps them.
    named = {f"{document.faiss.xxh3}.faiss", f"{document.table.xxh3}.npy"}
    named |= {f"{document.whitening.xxh3}.axes"} if document.whitening else set()
    for name in list_folder(folder):
        if re.fullmatch(r"[0-9a-f]{32}\.(faiss|npy|axes)", name) and name not in named:
            remove(folder / name)
    return document


def _fill(store: Store, index: "IndexIVF", latents: UnitVectors, workers: int) -> np.ndarray:
    """Fill a trained index; returns the latents' row at each of its positions.

    Positions count up through the cells, and within a cell by row: a position then leads to its cell without a map.
    """
    faiss = import_faiss()
    first_row = dict(zip(map(store.parts.index, latents.parts), latents.first[:-1].tolist(), strict=True))
    workers = workers if latents.rows > _ALONE_ROWS else 0
    # Of 20,000 rows in 1264 cells, 0.8 s go into finding the cells and 0.1 s into adding, on one core.
    # By their vectors alone: the bias need not travel to the workers.
    centroids_CD = np.ascontiguousarray(index.quantizer.reconstruct_n(0, index.nlist)[:, : latents.dim])
    find_cells = functools.partial(
        _load_cells, str(store.folder.absolute()), store.teacher, centroids_CD, latents.whitening
    )
    cell_n = np.empty(latents.rows, np.int64)
    found = map_with(
        find_cells,
        [*first_row],
        workers=workers,
        option_name="train.workers",
        name=lambda number: str(store.parts[number].path),
    )
    for number, found_n in found:
        cell_n[first_row[number] : first_row[number] + len(found_n)] = found_n
    order_n = np.argsort(cell_n, kind="stable")
    position_n = np.argsort(order_n)
    for first, vectors_nD in latents.blocks():
        rows = slice(first, first + len(vectors_nD))
        index.add_core(len(vectors_nD), *map(faiss.swig_ptr, (vectors_nD, position_n[rows], cell_n[rows])))
    return order_n


def _load_cells(
    folder: str, teacher: str, centroids_CD: np.ndarray, whitening: Whitening | None
) -> Callable[[int], tuple[int, np.ndarray]]:
    """What finds the cell of each row of a part, by the number of it in the store; a worker has one."""
    parts, coarse = Store(folder, teachers=(teacher,)).parts, import_faiss().IndexFlatIP(centroids_CD.shape[1])
    coarse.add(centroids_CD)
    coarse = move_to_gpu(coarse)

    def find_cells(number: int) -> tuple[int, np.ndarray]:
        blocks = UnitVectors([parts[number]], whitening).blocks()
        return number, np.concatenate([coarse.search(vectors_nD, 1)[1][:, 0] for _, vectors_nD in blocks])

    return find_cells


def _queries(parts: Sequence[Part], latents: UnitVectors, gallery: Sequence[str], seed: int) -> tuple[np.ndarray, str]:
    """Held-out queries (n, D), and what they are."""
    random = np.random.default_rng(seed)
    others = [part for part in parts if part.split not in gallery]
    # Probes are chosen by these, and nothing is chosen by a test split where there is another.
    others = [part for part in others if part.split == "val"] or others
    source = UnitVectors(others or latents.parts, latents.whitening)
    row_n = np.sort(random.choice(source.rows, min(_QUERIES, source.rows), replace=False, shuffle=False))
    vectors_nD = source.at(row_n)
    if others:
        described = f"{len(row_n)} latents of {', '.join(sorted({part.split for part in others}))}"
    else:
        vectors_nD = unit(vectors_nD + 0.1 * unit(random.standard_normal(vectors_nD.shape, np.float32)))
        described = f"{len(row_n)} latents of the gallery, moved by a tenth of their length"
    if latents.bias_m is not None:
        # Queries by H&E meet the bias, those by stored latents do not.
        vectors_nD = np.vstack([np.pad(vectors_nD, ((0, 0), (0, 1)), constant_values=meets) for meets in (1, 0)])
        described += ", with and without bias"
    return vectors_nD, described


def _reach_recall(
    index: "Index", latents: UnitVectors, order_n: np.ndarray, queries_nD: np.ndarray, target: float, factory: str
) -> tuple[float, int]:
    """Recall against the exact rows, and the cells to probe for it: half as many more until it is enough."""
    truth_nk = nearest(latents, queries_nD, min(_NEAREST, latents.rows))
    ivf: IndexIVF | None = import_faiss().try_extract_index_ivf(index)
    probes, cells = 0, ivf.nlist if ivf else 0
    while True:
        if ivf:
            ivf.nprobe = probes = min(cells, probes + max(1, probes // 2))
        found_nk = index.search(queries_nD, truth_nk.shape[1])[1]
        measured = measure_recall(latents, queries_nD, truth_nk, np.where(found_nk < 0, -1, order_n[found_nk]))
        if measured >= target:
            return measured, probes
        if probes == cells:
            raise DataError(
                f"the index {factory} reaches recall@10 {measured:.3f} with all its cells, below latents.recall "
                f"{target}: lower that, or choose another latents.index"
            )


def _publish(folder: Location, suffix: str, write: Callable[[Path], None]) -> IndexFile:
    """Write a file that is named by its digest."""
    with publish(folder / f"index{suffix}", lambda _: f"{made.xxh3}{suffix}") as temporary:
        write(temporary)
        with temporary.open("rb") as file:
            made = IndexFile(bytes=temporary.stat().st_size, xxh3=xxh3(file))
    return made


def _write_axes(whitening: Whitening, path: Path) -> None:
    with path.open("wb") as file:
        whitening.write(file)


def _write(index: "Index", path: Path, kind: tuple[str, int, int, int]) -> None:
    faiss = import_faiss()
    with path.open("wb") as file:
        # Of a full disk FAISS's own writer reports in a text only.
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    with path.open("rb") as file:
        # Another release of FAISS may write other bytes, which no search would take.
        check_file(file, *kind)


def measure_searcher(searcher: Searcher, latents_nD: np.ndarray, k: int = 10) -> float:
    """Recall@k of an index for these queries against exact search, as it is measured when an index is built."""
    latents = UnitVectors([searcher.store.parts[number] for number in searcher.parts.tolist()], searcher.whitening)
    queries_nD = unit(latents_nD if searcher.whitening is None else searcher.whitening.apply(latents_nD))
    k = min(k, latents.rows)
    _, position_nk = searcher.search(latents_nD, k)
    entry_nk = searcher.table[position_nk]
    found_nk = np.where(position_nk < 0, -1, latents.first[entry_nk["part"]] + entry_nk["row"])
    return measure_recall(latents, queries_nD, nearest(latents, queries_nD, k), found_nk)
