"""Retrieval with a bias against hubs, as vectors whose cosines say the same: every measure of embeddings is theirs too.

Shapes: n queries, m gallery rows, D length of a vector.
"""

import numpy as np

from lgd.metrics import Floats
from lgd.report.embeddings import Embedding
from lgd.report.neighbours import unit
from lgd.retrieval.bias import learn_bias


def with_bias(plain: Embedding, bank_nD: Floats, sharpness: float) -> Embedding:
    """The same vectors, ranked with a bias against hubs that is learnt from a bank of held-out H&E."""
    queries_nD, bank_nD = plain.queries_nD, unit(bank_nD)

    def bias(gallery_mD: Floats) -> tuple[Floats, Floats]:
        return add_bias(queries_nD, gallery_mD, learn_bias([unit(gallery_mD)], bank_nD, sharpness))

    queries, train_mD = bias(plain.train_mD)
    own_nD = None if plain.own_nD is None else bias(plain.own_nD)[1]
    return Embedding(f"{plain.name}, with bias", queries, train_mD, own_nD)


def add_bias(queries_nD: Floats, gallery_mD: Floats, bias_m: Floats) -> tuple[Floats, Floats]:
    """Vectors whose cosines are in the order of the cosine and a bias of the gallery's rows: (n, D + 2), (m, D + 2).

    A query meets the bias with a 1. The last number brings all rows to one length, so that scaling them to length 1
    leaves the order of a query as it is.
    """
    ones_n, zeros_n, reach_m = np.ones(len(queries_nD)), np.zeros(len(queries_nD)), bias_m**2
    fill_m = np.sqrt(reach_m.max(initial=0) - reach_m)
    queries = np.column_stack([unit(queries_nD), ones_n, zeros_n])
    return queries, np.column_stack([unit(gallery_mD), bias_m, fill_m])
