"""Nearest neighbours as the DINO protocol defines them, against a loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_probe_lists import clip_list

from eval_encoder.clip_views import Look
from eval_encoder.probe.neighbors import TEMPERATURE, _all_features, _evaluate, evaluate_neighbours
from training.distributed import process_group

WIDTH, CLASSES = 6, 4


class Stored:
    """Vectors [N, crops, C] of the crops of clips, which need no encoder."""

    def __init__(self, labels: np.ndarray, vectors: torch.Tensor):
        self.clips, self._vectors = clip_list(labels, CLASSES, "train"), vectors
        self.unreadable: dict[str, str] = {}

    def crops(self, indices):
        return [Look(int(i), 0, crop) for i in indices for crop in range(self._vectors.shape[1])]

    def batches(self, batches):
        for looks in batches:
            yield looks, [self._vectors[look.clip, look.within][None] for look in looks]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def several_labels(count: int) -> np.ndarray:
    labels = np.random.default_rng(count).integers(0, 2, (count, CLASSES)).astype(np.uint8)
    labels[:, 0] |= labels.sum(axis=1) == 0
    return labels


@pytest.mark.parametrize("ranked", [(1,), (1, 2, 5)])
def test_scores_are_the_weighted_shares_of_the_k_nearest(ranked):
    known, asked = F.normalize(draw(0, 12, WIDTH)), F.normalize(draw(1, 7, WIDTH))
    labels, listed = several_labels(12), several_labels(7)
    features = Stored(listed, draw(1, 7, 1, WIDTH))
    judged = _evaluate(features, np.arange(7), asked, known, labels, list(ranked))
    for row, k in enumerate(ranked):
        for clip in range(7):
            cosines = (known @ asked[clip]).double().numpy()
            nearest = np.argsort(-cosines)[:k]
            weights = np.exp(cosines[nearest] / TEMPERATURE)
            wanted = (weights[:, None] * labels[nearest]).sum(axis=0) / weights.sum()
            np.testing.assert_allclose(judged.scores[row, clip], wanted, atol=1e-4)


def test_every_crop_of_a_clip_counts_alike_however_long_its_vector():
    vectors = draw(2, 5, 3, WIDTH) * torch.tensor([0.01, 1.0, 100.0])[:, None]
    with process_group() as ranks:
        found, readable = _all_features(Stored(np.arange(5) % CLASSES, vectors), 2, ranks)
    wanted = F.normalize(F.normalize(vectors, dim=-1).sum(dim=1), dim=-1)
    torch.testing.assert_close(found, wanted)
    assert readable.all()


def test_k_is_chosen_on_held_out_clips_and_all_of_train_is_asked():
    labels = np.arange(40) % CLASSES
    # clips of a class lie around its axis, and so far apart that one neighbour is often wrong
    vectors = 0.7 * draw(3, 40, 1, WIDTH)
    vectors[np.arange(40), 0, labels] += 1.0
    features = Stored(labels, vectors)
    with process_group() as ranks:
        k, held, judged = evaluate_neighbours(features, features, 0.25, batch_size=8, ranks=ranks)
    assert k in (5, 10, 20) and held.evaluated.sum() == 10
    assert judged.evaluated.all() and judged.main()[0] > 80
