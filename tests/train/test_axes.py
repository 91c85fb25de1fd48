"""The axes along which latents are compared."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_loop import assert_same_curve, log_of

from lgd.shards.shard_set import ShardSet
from lgd.store.parts import read_all
from lgd.store.store import Store
from lgd.train.axes import fit_axes
from lgd.train.launch import train_under


@pytest.fixture(scope="module")
def parts(tissue_run):
    return Store(tissue_run.latents.dir).parts_of(ShardSet.open(tissue_run.shard_dirs).of_split("train"))


def rows_of(parts, name):
    """(n, D): all views and places of a dataset."""
    stored = read_all(parts, name).astype(np.float64)
    return np.moveaxis(stored, 2, -1).reshape(-1, stored.shape[2])


@pytest.mark.parametrize("kind", ["standardised", "whitened"])
@pytest.mark.parametrize("name", ["pooled", "map"])
def test_the_loss_of_the_mean_is_1(parts, kind, name):
    axes_DD, latent_nD = fit_axes(parts, ("pooled", "map", "nuclei"), kind)[name].numpy(), rows_of(parts, name)
    along_nD = (latent_nD - latent_nD.mean(0)) @ axes_DD
    assert (along_nD**2).sum(1).mean() == pytest.approx(1, rel=1e-4)
    if kind == "standardised":
        varies = latent_nD.std(0) > 1e-3 * latent_nD.std(0).max()
        np.testing.assert_allclose(along_nD.std(0)[varies], varies.sum() ** -0.5, rtol=1e-3)
    else:
        product = along_nD.T @ along_nD / len(along_nD)
        assert np.abs(product - np.diag(product.diagonal())).max() < 1e-5
        # As with the ridge of `QueryMap`: what varies like the average has half the weight of what varies most.
        variance_D = np.linalg.eigvalsh(np.cov(latent_nD.T, bias=True)).clip(0)
        share_D = variance_D / (variance_D + variance_D.mean())
        np.testing.assert_allclose(product.diagonal(), share_D / share_D.sum(), atol=1e-5)


@pytest.mark.parametrize("kind", ["standardised", "whitened"])
def test_a_run_along_axes_goes_on_the_same_and_is_told_from_another(tissue_run, change, tmp_path, kind):
    def made(name, epochs=2):
        fields = {"dir": str(tmp_path / name), "hallucination_loss": kind, "epochs": epochs}
        return change(tissue_run, student=fields, train={"checkpoint_every": 2})

    straight = made("straight")
    assert train_under(straight, "student")
    lines = log_of(straight.student.dir)
    assert all(line["hallucination"] > 0 and line["hallucination_map"] > 0 for line in lines)
    assert torch.isfinite(torch.tensor([line["loss"] for line in lines])).all()
    again = replace(made("again"), run=straight.run)
    assert train_under(again, "student")
    assert_same_curve(log_of(again.student.dir), lines, 0)
