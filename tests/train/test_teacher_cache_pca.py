"""Maps stored as coefficients of principal directions, for losses that compare relations."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_cache_tools import build, make
from torch.nn import functional as F
from train_tools import Scenes, collate, run

from fastkd import Term, losses
from fastkd.cli._settings import parse_ranks, show_ranks
from fastkd.distill.recorded import Part
from fastkd.distill.reduced import reduce_channels, restore_channels
from fastkd.train import TeacherCache
from fastkd.train.teacher_cache.pca import principal_bases, write_bases
from fastkd.train.teacher_cache.storage import Recorded

RANKS = {"stages.*": 3, "early": 4}


def relations() -> list[Term]:
    return [
        Term(losses.PixelRelationKD(), "stages.*", name="relation"),
        Term(losses.channel_kd, "early", name="tap"),
        Term(losses.logit_kd, "logits", name="kd"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reduced") / "cache"
    build(path, make(terms=relations()), dtype="int8", pca=RANKS)
    return path


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)])
def test_directions_keep_most_of_the_squared_values(order: tuple[int, ...]) -> None:
    maps = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None, None]
    maps += 3  # not centred
    stored = maps.permute(order).contiguous()
    found = principal_bases({"x": 2}, [Recorded({"x": Part(None, (maps.dtype,), (order,))}, {"x": stored})])
    basis = found.bases["x"]
    again = restore_channels(reduce_channels(stored, basis, order.index(1)).permute(0, *_inverse(order)), basis, order)
    assert again.permute(order).is_contiguous()
    values = torch.linalg.svdvals(maps.movedim(1, -1).reshape(-1, 6).double()).square()
    assert found.kept["x"] == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-6)
    lost = float((again - maps).double().square().sum() / maps.double().square().sum())
    assert 1 - lost == pytest.approx(found.kept["x"], rel=1e-5)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return [order.index(dim) for dim in range(1, len(order))]


@pytest.mark.parametrize("similarity", ["cosine", "mean", "dot"])
def test_relations_of_maps_within_the_directions_are_kept(similarity: str) -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 3, generator=g)).Q
    teacher = torch.einsum("cr,brn->bcn", basis, torch.randn(2, 3, 16, generator=g))
    student = torch.randn(2, 8, 16, generator=g)
    again = restore_channels(reduce_channels(teacher, basis, 1), basis, (0, 1, 2))
    for loss in (losses.pixel_relation_kd, losses.channel_kd):
        exact, ours = (loss(student, each, similarity=similarity, temperature=1.0) for each in (teacher, again))
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def test_reduced_cache_trains_and_its_error_is_measured(folder: Path) -> None:
    cache = TeacherCache(folder)
    assert cache.measured["bytes_per_sample"] == (3 + 3 + 4 + 2) * 64 + 4 * 8 * 4  # codes; scales of a map's rows
    errors = cache.measured["errors"]
    assert errors["kd"]["gradient"] < 0.02 < errors["relation"]["gradient"] < 1  # logits are not reduced
    assert all(0.5 < kept < 1 for kept in cache.measured["kept"].values())
    cached = make(cache, terms=relations())
    batch = cache.collate(collate, cached)([Scenes()[n] for n in range(8)])
    exact = make(terms=relations()).record_teacher(batch)
    for ours, theirs, name in zip(cache.output(batch)["stages.*"], exact["stages.*"], ("0", "1"), strict=True):
        lost = float((ours - theirs).square().sum() / theirs.square().sum())
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert 1 - lost == pytest.approx(cache.measured["kept"][f"stages.*/{name}"], abs=0.05)
    run(cached, steps=2)


def test_bases_are_kept_when_a_build_continues(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copied / "shard-00002.safetensors").unlink()
    (copied / "basis.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"basis.safetensors cannot be read .*: build the cache again"):
        TeacherCache(copied)
    build(copied, make(terms=relations()), dtype="int8", pca=RANKS)
    for name in ("shard-00002.safetensors", "basis.safetensors"):
        assert (copied / name).read_bytes() == (folder / name).read_bytes()
    other = principal_bases({"x": 1}, [Recorded({"x": Part(None, (), ((0, 1),))}, {"x": torch.rand(3, 2)})])
    write_bases(copied, other)
    with pytest.raises(ValueError, match=r"basis.safetensors belongs to another cache or is damaged"):
        TeacherCache(copied)


class TestRefused:
    @pytest.mark.parametrize(
        ("ranks", "message"),
        [
            ({"logits": 1}, r"term 'kd' reads 'logits' .* only channel_kd and pixel_relation_kd compare such maps"),
            ({"stage.*": 3}, r"pca: no term reads 'stage.\*' from the teacher. Did you mean 'stages.\*'"),
            ({"early": 0}, "the rank of 'early' must be an integer from 1 to 7, for 8 channels, got 0"),
            ({"early": 8}, "from 1 to 7, for 8 channels, got 8"),
            ({"early": 2.5}, r"got 2\.5"),
        ],
    )
    def test_while_building(self, ranks: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            build(tmp_path / "c", make(terms=relations()), pca=ranks)
        assert not (tmp_path / "c").exists()

    def test_other_ranks_in_the_same_folder(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"of other terms or taps \(.*pca.ranks.early: 4 → 5"):
            build(folder, make(terms=relations()), dtype="int8", pca={**RANKS, "early": 5})

    def test_term_that_needs_the_whole_map(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"term 'mse' reads 'early' of the teacher, whose channels are reduced"):
            make(TeacherCache(folder), terms=[Term(F.mse_loss, "early", name="mse")])

    def test_map_as_an_option(self, folder: Path) -> None:
        term = Term(losses.pixel_relation_kd, "stages.*", teacher="stages.*", kwargs={"weight": "teacher.early"})
        with pytest.raises(ValueError, match="term 'pixel_relation_kd' reads 'early'"):
            make(TeacherCache(folder), terms=[term])

    @pytest.mark.parametrize("text", ["early", "early=x", "=3", "early=-1"])
    def test_flag(self, text: str) -> None:
        assert parse_ranks(show_ranks(RANKS)) == RANKS
        with pytest.raises(ValueError, match="expected each path once, as path=rank"):
            parse_ranks([text])
