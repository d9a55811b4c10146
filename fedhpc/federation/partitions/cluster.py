"""Class mixes from a Dirichlet distribution, of topics that are found in the texts.

A text's place is the direction in which the mean of the backbone's word embeddings over its prompt lies from that of
all texts: Towards Universal Paraphrastic Sentence Embeddings. Wieting, Bansal, Gimpel, Livescu. ICLR 2016.
https://arxiv.org/abs/1511.08198. Topics are clusters of places: k-means++: The Advantages of Careful Seeding. Arthur,
Vassilvitskii. SODA 2007.

Ranks on different machines must find the same topics, bit by bit. All sums here are of whole numbers that float64 or
int64 hold exactly, so that no order of summation changes one; between them there is at most one rounding, to the
nearest.
"""

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from fedhpc.errors import ConfigError
from fedhpc.federation.partition import Groups, Words
from fedhpc.federation.partitions.dirichlet import Dirichlet
from fedhpc.registry import PARTITIONS

if TYPE_CHECKING:
    from fedhpc.data.prepared import PreparedData, Split

WIDTH = 64
"""Embeddings are projected on so many random directions: distances stay about the same (Achlioptas 2003)."""
EMBEDDING_UNITS, PLACE_UNITS = 2**16, 2**10
"""In 1: of an embedding, of a text's place."""
ROWS = 4096
"""Embeddings that are widened at a time."""
MOST_TURNS = 100


@PARTITIONS.register("cluster")
class Cluster(Dirichlet):
    """Each device with a mix of topics of its own."""

    class Config(Dirichlet.Config):
        """Keys."""

        clusters: Annotated[int, Field(ge=2)] = 10
        """Topics that k-means finds in the mean word embeddings of the prompts, k."""

    def groups(self, data: "PreparedData", words: Words) -> Groups:
        """See `Partitioner`."""
        splits = [data.split(name) for name in ("train", "validation")]
        prompts = [prompts_of(split, data.description.generation.get("format")) for split in splits]
        train, validation = places(prompts[0], prompts[1], words, self.rng("directions"))
        k = self.config.clusters
        if (different := len(np.unique(train, axis=0))) < k:
            raise ConfigError(
                f"federation.clusters: {k}, but the training prompts are {different} different mixes of words; valid: "
                + (f"at most {different}" if different > 1 else "another partition, iid or quantity")
            )
        centres = k_means(train, k, self.rng("topics"))
        distances = _distances(train, centres)
        return Groups(
            train=distances.argmin(axis=1),
            validation=_distances(validation, centres).argmin(axis=1),
            names=[f"topic {number}" for number in range(k)],
            examples=distances.argmin(axis=0).tolist(),
        )


def prompts_of(split: "Split", text_format: str | None) -> list[np.ndarray]:
    """The tokens before the first that is trained; all of them where a whole text is trained, or classified."""
    ends = split.offsets[1:]
    if split.spans is not None and text_format != "text":
        begins = split.spans[::2]
        ends = begins[np.searchsorted(begins, split.offsets[:-1])]
    return [np.asarray(split.tokens[begin:end]) for begin, end in zip(split.offsets, ends, strict=False)]


def places(
    train: list[np.ndarray], validation: list[np.ndarray], words: Words, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Where texts lie: whole numbers ``[n, WIDTH]``, at a distance of PLACE_UNITS from the training texts' mean.

    Args:
        train: token ids of each text.
        validation: the same.
    """
    known = np.unique(np.concatenate([*train, *validation])).astype(np.int64)
    row = np.zeros(known[-1] + 1, np.int64)
    row[known] = np.arange(len(known))
    parts = [words(known[first : first + ROWS]) for first in range(0, len(known), ROWS)]
    signs = rng.choice([-1.0, 1.0], (parts[0].shape[1], WIDTH))
    table = np.concatenate([np.rint(part.astype(float) * EMBEDDING_UNITS) @ signs for part in parts])

    def means(texts: list[np.ndarray]) -> np.ndarray:
        sums = [table[row[text]].sum(axis=0) / max(1, len(text)) for text in texts]
        return np.rint(np.reshape(sums, (len(texts), WIDTH)))

    of_train = means(train)
    middle = np.rint(of_train.sum(axis=0) / len(of_train))
    return _at_one_distance(of_train - middle), _at_one_distance(means(validation) - middle)


def _at_one_distance(vectors: np.ndarray) -> np.ndarray:
    lengths = np.sqrt((vectors.astype(np.int64) ** 2).sum(axis=1, keepdims=True))
    return np.rint(PLACE_UNITS * (vectors / np.maximum(lengths, 1.0)))


def k_means(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Lloyd's algorithm: centres, whole numbers [k, d], none of them without points.

    Args:
        points: whole numbers [n, d], at least k of them different.
        k: number of centres.
        rng: draws the first ones, each with a probability proportional to the squared distance from those before.
    """
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < k:
        left = _distances(points, points[chosen]).min(axis=1) + (points**2).sum(axis=1)
        ends = np.cumsum(left.astype(np.int64))
        chosen.append(int(np.searchsorted(ends, rng.integers(ends[-1]), side="right")))
    centres, before = points[chosen], None
    for _ in range(MOST_TURNS):
        distances = _distances(points, centres)
        nearest = distances.argmin(axis=1)
        sizes = np.bincount(nearest, minlength=k)
        for empty in np.flatnonzero(sizes == 0):  # it begins anew at the point that is worst off
            away = np.where(sizes[nearest] > 1, distances.min(axis=1) + (points**2).sum(axis=1), -1.0)
            worst = away.argmax()
            sizes[nearest[worst]] -= 1
            nearest[worst], sizes[empty] = empty, 1
            distances[worst] = -np.inf
        if before is not None and np.array_equal(nearest, before):
            break
        centres = np.rint(np.stack([points[nearest == number].sum(axis=0) for number in range(k)]) / sizes[:, None])
        before = nearest
    return centres


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Squared distances [n, k], less each point's own squared length: exact."""
    return (centres**2).sum(axis=1) - 2 * points @ centres.T
