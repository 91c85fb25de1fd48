"""`lgd ablate --transfer FILE`: what frozen features know of questions that training never asked.

    RUN/ablation/VARIANT/seed-0.features.npz    a network's features of the training and of the scored patches
    RUN/ablation/transfer.json, .md, .png       the table and its figure

Beside the networks of `lgd ablate` stand colour alone, a network that nobody trained, the features of each method
mapped to the teacher's latents by a ridge regression over all training pairs, and these latents, which need the IHC.
All are probed alike (`lgd.report.questions`).
"""

import functools
import io
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from lgd.base.device import exact_float32, find_device
from lgd.base.errors import DataError
from lgd.config import Config
from lgd.io.digests import digest_of
from lgd.io.files import exists, publish, read_bytes, write_bytes
from lgd.io.location import Location, as_location
from lgd.metrics import Floats, interval
from lgd.models.description import StudentConfig
from lgd.models.loading import load_student
from lgd.models.methods import BASELINE, METHODS, find_method
from lgd.report.ablation import AblateOptions, Job, jobs_of, map_jobs
from lgd.report.ablation_table import LGD_NET, AblationDocument
from lgd.report.colour import COLOUR, read_colours
from lgd.report.embeddings import ridge
from lgd.report.probed import pooled_latents
from lgd.report.questions import DRAWS, SIZES, Question, answer_by_probes, read_questions, score_answers
from lgd.report.transfer_table import Asked, Probed, TransferDocument, draw_transfer, format_transfer
from lgd.shards.archive import Shard
from lgd.shards.shard_set import ShardSet
from lgd.store.store import Store
from lgd.stream.reader import Reader, in_batches, stream

logger = logging.getLogger(__name__)

UNTRAINED, LATENTS, MAPPED = "untrained network", "IHC latents", "{}, ridge to the latents"
_BATCH = 64


class Features(NamedTuple):
    """What a row of the table is probed by."""

    train_mF: Floats
    scored_tF: Floats


class Patches(NamedTuple):
    """Some patches, in the order of their shards."""

    shards: Sequence[Shard]
    keys: list[str]
    groups: list[str]


class Inquiry(NamedTuple):
    """What is asked, of which patches."""

    questions: list[Question]
    training: Patches
    scored: Patches
    colours: Features


def open_inquiry(config: Config, shards: ShardSet, path: str) -> Inquiry:
    """The questions of a CSV, and the patches of a run; raises `DataError` for one that too few of these answer."""
    parts = shards.of_split("train"), shards.require_split(config.report.split, "report.split")
    colours = [read_colours(some, config.data.threads) for some in parts]
    training, scored = (
        Patches(some, [meta.key for meta in one.metas], [meta.group for meta in one.metas])
        for some, one in zip(parts, colours, strict=True)
    )
    questions = read_questions(as_location(path))
    for question in questions:
        for some, split, least in ((training, "train", SIZES[0]), (scored, config.report.split, 2)):
            if (known := int((~np.isnan(question.find(some.keys))).sum())) < least:
                raise DataError(
                    f"{path}: column {question.name} has a number for {known} patches of the split {split}, of at "
                    f"least {least}: give more, by the keys of the shards, such as {some.keys[0]}"
                )
    return Inquiry(questions, training, scored, Features(*(one.colour_n9 for one in colours)))


def compare_transfer(
    config: Config, shards: ShardSet, options: AblateOptions, inquiry: Inquiry, table: AblationDocument
) -> str:
    """Probe the networks of a comparison, which are trained; returns the table."""
    folder = as_location(config.run.dir) / "ablation"
    rows = {COLOUR: [inquiry.colours]} | _read_networks(config, shards, options, inquiry)
    document = TransferDocument(
        seeds=options.seeds,
        draws=DRAWS,
        resamples=config.report.bootstrap,
        questions=digest_of([[one.name, one.answers] for one in inquiry.questions]),
        asked=tuple(_probe_all(rows, inquiry, config)),
        caveats=table.caveats,
        command=table.command,
        shards=table.shards,
        teacher=table.teacher,
    )
    document.write(folder / "transfer.json")
    text = format_transfer(document)
    write_bytes(folder / "transfer.md", text.encode())
    draw_transfer(document, folder / "transfer.png")
    return text


def _read_networks(
    config: Config, shards: ShardSet, options: AblateOptions, inquiry: Inquiry
) -> dict[str, list[Features]]:
    """The rows of all networks, and of the teacher's latents."""
    training, scored = inquiry.training, inquiry.scored
    torch.manual_seed(config.run.seed)
    untrained = find_method(BASELINE)(config, shards.target, shards.summarise_values("train")).build().eval()
    rows = {UNTRAINED: [_see_all(untrained, config, training, scored)]}
    store = Store(config.latents.dir, teachers=(config.teacher.name,))
    latents = read_latents(store, training, scored)
    jobs = list(jobs_of(config, options))
    for job in map_jobs(functools.partial(keep_features, training, scored), jobs, config, options.jobs):
        logger.info("[ablate] %s, seed %d: features read", job.name, job.number)
    mapped: dict[str, list[Features]] = {}
    methods = [kind.title for kind in METHODS.values()]
    for job in jobs:
        features = read_features(job)
        rows.setdefault(job.name, []).append(features)
        if job.name in methods:
            mapped.setdefault(MAPPED.format(job.name), []).append(map_features(features, latents, training.groups))
    return rows | mapped | {LATENTS: [latents]}


def read_latents(store: Store, training: Patches, scored: Patches) -> Features:
    """A teacher's latents, in place of features."""
    return Features(*(pooled_latents(store, some.shards) for some in (training, scored)))


def map_features(features: Features, latents: Features, groups: Sequence[str]) -> Features:
    """The latents that a ridge regression over all training pairs reads off the features."""
    said_nD, _ = ridge(features.train_mF, latents.train_mF, groups, np.concatenate(features))
    return Features(*np.split(said_nD, [len(groups)]))


def keep_features(training: Patches, scored: Patches, job: Job) -> Job:
    """Read the features of a trained network, unless they were kept of just this one."""
    at = _find_kept(job)
    stamp = " ".join(
        [
            StudentConfig.read_folder(job.run.student.dir).weights_sha256,
            *(shard.sha256 for some in (training, scored) for shard in some.shards),
        ]
    )
    if exists(at) and _read_kept(at)[1] == stamp:
        return job
    model, _ = load_student(job.run.student.dir, job.run.code)
    train_mF, scored_tF = _see_all(model, job.run, training, scored)
    with publish(at) as temporary, temporary.open("wb") as file:
        np.savez(file, stamp=stamp, train=train_mF.astype(np.float32), scored=scored_tF.astype(np.float32))
    return job


def read_features(job: Job) -> Features:
    """What `keep_features` kept of a network."""
    return _read_kept(_find_kept(job))[0]


def _find_kept(job: Job) -> Location:
    return as_location(f"{job.run.student.dir}.features.npz")


def _read_kept(at: Location) -> tuple[Features, str]:
    with np.load(io.BytesIO(read_bytes(at))) as kept:
        return Features(kept["train"].astype(np.float64), kept["scored"].astype(np.float64)), str(kept["stamp"])


def _see_all(model: nn.Module, config: Config, training: Patches, scored: Patches) -> Features:
    return Features(*(_see(model, config, some.shards) for some in (training, scored)))


def _see(model: nn.Module, config: Config, shards: Sequence[Shard]) -> Floats:
    """All that a student pools of each H&E, of both streams where it has two: (n, F)."""
    device, reader, found = find_device(), Reader(shards, ("he",), config.data.size), []
    model = model.to(device)
    for _, images in stream(reader, in_batches(range(reader.total), _BATCH), threads=config.data.threads):
        with torch.inference_mode(), exact_float32():
            out = model(torch.from_numpy(images["he"]).permute(0, 3, 1, 2).to(device))
        found.append(out.get("streams", out["features"]).double().cpu().numpy())
    reader.close()
    return np.concatenate(found)


def _probe_all(rows: Mapping[str, Sequence[Features]], inquiry: Inquiry, config: Config) -> Iterator[Asked]:
    """What each row scores at each question. Those that the same training patches answer are fitted together."""

    def known_of(question: Question) -> bytes:
        return np.isnan(question.find(inquiry.training.keys)).tobytes()

    for _, some in itertools.groupby(sorted(inquiry.questions, key=known_of), key=known_of):
        yield from _probe(rows, inquiry._replace(questions=[*some]), config)


def _probe(rows: Mapping[str, Sequence[Features]], inquiry: Inquiry, config: Config) -> Iterator[Asked]:
    """Of questions that the same training patches answer."""
    questions, training, scored, _ = inquiry
    answer_mQ, answer_tQ = (np.stack([one.find(some.keys) for one in questions], 1) for some in (training, scored))
    known = int((~np.isnan(answer_mQ[:, 0])).sum())
    sizes = [size for size in SIZES if size <= known]
    asked_of = [np.flatnonzero(~np.isnan(answer_t)) for answer_t in answer_tQ.T]
    groups_of = [[scored.groups[row] for row in row_n.tolist()] for row_n in asked_of]
    drawn: dict[tuple[str, str, int], dict[str, list[Floats]]] = {}
    for (name, runs), size in itertools.product(rows.items(), sizes):
        for features in runs:
            said_UtQ = answer_by_probes(*features, answer_mQ, size, config.run.seed)
            for number, (question, row_n, groups) in enumerate(zip(questions, asked_of, groups_of, strict=True)):
                answers = said_UtQ[:, row_n, number], answer_tQ[row_n, number], groups, question.steps
                for measure, drawn_R in score_answers(*answers, config.report.bootstrap, config.run.seed).items():
                    drawn.setdefault((question.name, measure, size), {}).setdefault(name, []).append(drawn_R)
        logger.info("[ablate] %s, probes of %d patches", name, size)
    for question, row_n, groups in zip(questions, asked_of, groups_of, strict=True):
        for measure in question.measures:
            yield Asked(
                question=question.name,
                measure=measure,
                training_patches=known,
                patches=len(row_n),
                groups=len(set(groups)),
                sizes={str(size): _compare(drawn[question.name, measure, size], len(set(groups))) for size in sizes},
            )


def _compare(drawn: Mapping[str, Sequence[Floats]], groups: int) -> dict[str, Probed]:
    """Each row's mean over its trainings, and what LGD-Net gains over it, paired by resample and training."""
    ours_SR = np.stack(drawn[LGD_NET])
    return {
        name: Probed(
            mean=interval(np.stack(runs), groups),
            lgd_minus=None if name == LGD_NET else interval(ours_SR - np.stack(runs), groups),
        )
        for name, runs in drawn.items()
    }
