"""Synthetic data with a planted model: the best possible AUC and log loss are known exactly.

`synthetic:criteo` looks like Criteo's display-advertising data; `synthetic:zipf4` is a small bed for comparing
embedding tables.  Rows are independent and alike, so the splits are stretches of one sequence.  Chunk c of 32,768
rows comes from Philox keyed by (seed, c + 1), the planted weights from the key (seed, 0): every value depends on the
seed and its row alone, not on threads or the order of work.

Letters in names: N rows of a chunk, L ids, E ids of a feature, R rank of the planted interaction.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from kernels import registry
from kernels.errors import UserError
from trainer.data.dataset import Bayes, Categorical, Dataset, Dense, row_group_rows
from trainer.prepare.spec import Options
from trainer.prepare.stats import make_stats
from trainer.prepare.work import ordered_map
from trainer.prepare.write import Folder, SplitWriter, fingerprint, id_type, make_schema

CHUNK_ROWS = 32768

# Distinct values of C1..C26 in Criteo's Kaggle data.
CRITEO_CARDINALITIES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)


class Zipf4Options(Options):
    rows: int = Field(default=1_000_000, ge=10)
    seed: int = Field(default=1, ge=0, lt=2**63)  # Bayes AUC 0.8496 on its test split


class CriteoOptions(Options):
    rows: int = Field(default=600_000, ge=10)
    scale: float = Field(default=0.001, gt=0.0, le=1.0)  # cardinality = min(Criteo's, max(1000, scale * Criteo's))


@dataclass
class Chunk:
    """Rows of a planted data set: columns in schema order, and each row's true probability."""

    columns: dict[str, pa.Array]
    probability_N: np.ndarray  # float64
    label_N: np.ndarray  # bool

    def slice(self, start: int, end: int | None) -> "Chunk":
        stop = len(self.label_N) if end is None else end
        columns = {name: column.slice(start, stop - start) for name, column in self.columns.items()}
        return Chunk(columns, self.probability_N[start:stop], self.label_N[start:stop])


def generator(seed: int, stream: int) -> np.random.Generator:
    """The random numbers of one chunk (stream = chunk + 1), or of the planted weights (stream = 0)."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


class Zipf4:
    """Four fields of 20,000 ids, Zipf 1.05 over permuted ids.

    logit = 0.8 * sum_f b_f[id_f] + 1.5 * (<v_0, v_1> + <v_2, v_3>) - 0.5 with b ~ N(0, 1) and v ~ N(0, 0.25 I_4).
    """

    IDS, EXPONENT, RANK = 20_000, 1.05, 4
    SPLITS = (("train", 0.8), ("test", 0.2))
    LABEL = "label"
    words = "planted: 4 fields x 20,000 ids, Zipf 1.05, main effects and two dot products of rank 4"

    def __init__(self, options: Zipf4Options) -> None:
        self.seed = options.seed
        random = generator(self.seed, 0)
        mass = np.arange(1, self.IDS + 1) ** -self.EXPONENT
        self._below = np.cumsum(mass / mass.sum())
        self._id_of_rank = [random.permutation(self.IDS) for _ in range(4)]
        self._bias = random.standard_normal((4, self.IDS))
        self._vector = 0.5 * random.standard_normal((4, self.IDS, self.RANK))
        self.features = {f"f{i}": self.IDS for i in range(4)}
        self.multi_hot: tuple[str, ...] = ()
        self.with_missing: tuple[str, ...] = ()
        self.dense: tuple[str, ...] = ()

    def chunk(self, number: int, rows: int) -> Chunk:
        random = generator(self.seed, number + 1)
        ids = []
        for ranks in self._id_of_rank:
            rank_N = np.searchsorted(self._below, random.random(rows), side="right")
            ids.append(ranks[rank_N.clip(max=self.IDS - 1)])
        bias_N = sum(self._bias[f][ids[f]] for f in range(4))
        v = [self._vector[f][ids[f]] for f in range(4)]
        logit_N = 0.8 * bias_N + 1.5 * ((v[0] * v[1]).sum(1) + (v[2] * v[3]).sum(1)) - 0.5
        probability_N = sigmoid(logit_N)
        label_N = random.random(rows) < probability_N
        columns = {"label": pa.array(label_N.astype(np.float32))}
        columns |= {f"f{f}": pa.array(ids[f].astype(np.int32)) for f in range(4)}
        return Chunk(columns, probability_N, label_N)


class Criteo:
    """Rows like Criteo's: 13 counts, 26 categorical features, three of them multi-hot, some values missing.

    Ids are numbered by popularity, as a vocabulary numbers them; feature f's id of rank k = 1 .. E has the share
    F(k + 1) - F(k) of a power law cut off at the cardinality E: F(x) = (x^(1-s) - 1) / ((E+1)^(1-s) - 1), s drawn from
    EXPONENTS for each feature.

    signal = sum of id effects + PAIR_SCALE * sum over PAIRS of <v_f, v_g> + effects of counts and of missing values
    logit = gain * signal + intercept, so that its standard deviation is SPREAD and a share POSITIVE of the labels is 1

    The effect of an id of rank k is normal with standard deviation FEATURE_SCALE / sqrt(1 + (k - 1) / HALF_RANK), and
    the elements of its vector shrink likewise: nobody can learn an id that occurs a handful of times, so the planted
    truth gives it little to say.  A model trained for one epoch then comes close to Bayes, which is what this data is
    for: telling whether training works.  It says nothing about how much real data rewards rare ids.

    Counts start at 1, so that a missing one, which is written as 0 as prepare does, can be told from a small one.
    """

    SPLITS = (("train", 0.8), ("valid", 0.1), ("test", 0.1))
    LABEL = "label"
    MULTI_HOT: ClassVar = {"C3": 3.0, "C12": 2.0, "C21": 4.0}  # mean ids of a bag that is not empty, geometric
    MISSING: ClassVar = {"C4": 0.05, "C12": 0.1, "C19": 0.4, "C20": 0.4, "C22": 0.7, "C25": 0.4, "C26": 0.4}
    DENSE_MISSING = (0.4, 0.0, 0.2, 0.2, 0.03, 0.2, 0.04, 0.0, 0.04, 0.4, 0.04, 0.7, 0.2)
    EXPONENTS = (1.4, 1.8)
    FEATURE_SCALE, HALF_RANK = 0.2, 3.0
    PAIRS = (("C6", "C17"), ("C14", "C23"), ("C9", "C20"))
    RANK, PAIR_SCALE = 2, 0.9
    DENSE_EFFECT: ClassVar = {"I2": 0.2, "I5": -0.2, "I7": 0.2, "I11": -0.2}  # of a deviation of the logarithm
    BENT = "I6", 0.15  # a count whose effect is a parabola, so that a straight line does not say all
    GONE_EFFECT: ClassVar = {"I1": 0.3, "I10": -0.3}  # of a missing count
    SPREAD, POSITIVE = 1.45, 0.25

    words = "planted: Criteo-like, id effects, dot products of pairs, effects of counts and of what is missing"

    def __init__(self, options: CriteoOptions) -> None:
        self.seed = options.seed
        random = generator(self.seed, 0)
        self.features = {
            f"C{i + 1}": min(full, max(1000, round(full * options.scale)))
            for i, full in enumerate(CRITEO_CARDINALITIES)
        }
        self.dense = tuple(f"I{i + 1}" for i in range(13))
        self.multi_hot = tuple(self.MULTI_HOT)
        self.with_missing = tuple(self.MISSING)
        low, high = self.EXPONENTS
        self._exponent = {name: low + (high - low) * random.random() for name in self.features}
        self._effect = {
            name: self.FEATURE_SCALE * random.standard_normal(ids, dtype=np.float32) * self._shrink(ids)
            for name, ids in self.features.items()
        }
        self._vector = {
            name: random.standard_normal((ids, self.RANK), dtype=np.float32) * self._shrink(ids)[:, None]
            for name, ids in ((n, self.features[n]) for pair in self.PAIRS for n in pair)
        }
        self._missing_effect = {name: self.FEATURE_SCALE * random.standard_normal() for name in self.MISSING}
        self._log_mean = random.uniform(1.0, 2.5, 13)
        self._log_spread = random.uniform(0.6, 1.2, 13)
        self._gain, self._intercept = self._calibrate()

    def _calibrate(self) -> tuple[float, float]:
        """Gain and intercept from one chunk of rows that belongs to no split."""
        _, signal_N = self._draw_rows(generator(self.seed, 2**64 - 1), CHUNK_ROWS)
        gain = self.SPREAD / float(signal_N.std())
        low, high = -20.0, 20.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            too_low = sigmoid(gain * signal_N + middle).mean() < self.POSITIVE
            low, high = (middle, high) if too_low else (low, middle)
        return gain, 0.5 * (low + high)

    def _shrink(self, ids: int) -> np.ndarray:
        return (1.0 / np.sqrt(1.0 + np.arange(ids) / self.HALF_RANK)).astype(np.float32)

    def _draw(self, name: str, random: np.random.Generator, count: int) -> np.ndarray:
        """int32 ids, the most popular one 0: the inverse of F."""
        ids, flat = self.features[name], 1.0 - self._exponent[name]
        at = (1.0 + random.random(count) * ((ids + 1.0) ** flat - 1.0)) ** (1.0 / flat)
        return (at.astype(np.int32) - 1).clip(0, ids - 1)

    def chunk(self, number: int, rows: int) -> Chunk:
        random = generator(self.seed, number + 1)
        columns, signal_N = self._draw_rows(random, rows)
        probability_N = sigmoid(self._gain * signal_N + self._intercept)
        label_N = random.random(rows) < probability_N
        return Chunk({self.LABEL: pa.array(label_N.astype(np.float32)), **columns}, probability_N, label_N)

    def _draw_rows(self, random: np.random.Generator, rows: int) -> tuple[dict[str, pa.Array], np.ndarray]:
        """(dense and categorical columns, signal float64 N)."""
        signal_N = np.zeros(rows)
        columns: dict[str, pa.Array] = {}
        for i, name in enumerate(self.dense):
            columns[name] = pa.array(self._draw_count(i, name, random, signal_N))
        single: dict[str, np.ndarray] = {}
        for name in self.features:
            gone_N = random.random(rows) < self.MISSING.get(name, 0.0)
            if name in self.MULTI_HOT:
                columns[name] = self._draw_bags(name, random, gone_N, signal_N)
            else:
                ids_N = self._draw(name, random, rows)
                signal_N += np.where(gone_N, 0.0, self._effect[name][ids_N])
                columns[name] = pa.array(ids_N, mask=gone_N)
                single[name] = np.where(gone_N, -1, ids_N)
            signal_N += gone_N * self._missing_effect.get(name, 0.0)
        for left, right in self.PAIRS:
            both_N = (single[left] >= 0) & (single[right] >= 0)
            product_N = (self._vector[left][single[left]] * self._vector[right][single[right]]).sum(1)
            signal_N += self.PAIR_SCALE * both_N * product_N
        return columns, signal_N

    def _draw_count(self, i: int, name: str, random: np.random.Generator, signal_N: np.ndarray) -> np.ndarray:
        """log(1 + count), 0 where it is missing, float32 N; adds its effect to signal_N."""
        count_N = 1.0 + np.floor(
            np.exp(self._log_mean[i] + self._log_spread[i] * random.standard_normal(len(signal_N)))
        )
        gone_N = random.random(len(signal_N)) < self.DENSE_MISSING[i]
        logged_N = np.where(gone_N, 0.0, np.log1p(count_N)).astype(np.float32)
        deviation_N = ((logged_N - self._log_mean[i]) / self._log_spread[i]).clip(-3.0, 3.0)
        signal_N += self.DENSE_EFFECT.get(name, 0.0) * deviation_N + self.GONE_EFFECT.get(name, 0.0) * gone_N
        if name == self.BENT[0]:
            signal_N += self.BENT[1] * deviation_N**2
        return logged_N

    def _draw_bags(self, name: str, random: np.random.Generator, gone_N: np.ndarray, signal_N: np.ndarray) -> pa.Array:
        """A list of ids a row, null where it is missing; adds the sum of their effects to signal_N."""
        size_N = np.where(gone_N, 0, random.geometric(1.0 / self.MULTI_HOT[name], len(gone_N)))
        offsets = np.concatenate([[0], np.cumsum(size_N)])
        ids_L = self._draw(name, random, int(offsets[-1]))
        running = np.concatenate([[0.0], np.cumsum(self._effect[name][ids_L], dtype=np.float64)])
        signal_N += running[offsets[1:]] - running[offsets[:-1]]
        kind = id_type(self.features[name], multi_hot=True)
        mask = pa.array(gone_N) if gone_N.any() else None
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids_L), type=kind, mask=mask)


KINDS: dict[str, tuple[type, type]] = {"criteo": (Criteo, CriteoOptions), "zipf4": (Zipf4, Zipf4Options)}


def options_of(kind: str) -> type[Options]:
    """The options class of `synthetic:KIND`; UserError with the nearest name when there is no such kind."""
    if kind not in KINDS:
        raise UserError(f"synthetic:{kind}: {registry.nearest(kind, sorted(KINDS))}")
    return KINDS[kind][1]


def prepare(
    kind: str,
    dest: str | Path,
    options: Options,
    *,
    inputs: str,
    progress: Callable[[int, int, str], None],
) -> Dataset:
    """Generate and write `synthetic:KIND`; `options` as its options class validated them.

    Memory: 9 bytes for each row of a split (its probabilities and labels, sorted at its end), 8 bytes for each id of
    each feature, and 2 * threads chunks.
    """
    planted = KINDS[kind][0](options)
    sizes = share_out(options.rows, planted.SPLITS)
    schema = make_schema(
        labels=(planted.LABEL,),
        dense=planted.dense,
        categorical={n: id_type(e, multi_hot=n in planted.multi_hot) for n, e in planted.features.items()},
        nullable=set(planted.with_missing),
    )
    splits, bayes = {}, {}
    with Folder(dest, replace=options.existing == "replace") as folder:
        chunks = range(-(-options.rows // CHUNK_ROWS))
        made = ordered_map(lambda c: planted.chunk(c, CHUNK_ROWS), chunks, threads=options.threads)
        cut = _Cutter(made, lambda done: progress(min(done, options.rows), options.rows, "generating"))
        for name, rows in sizes.items():
            group_rows = options.row_group_rows or row_group_rows(rows)
            writer = SplitWriter(folder.path, name, schema, group_rows=group_rows)
            figures = _Figures(planted)
            try:
                for chunk in cut.take(rows):
                    writer.add(pa.table(chunk.columns, schema=schema))
                    figures.add(chunk)
                splits[name] = writer.finish()
            finally:
                writer.close()
            bayes[name] = bayes_of(np.concatenate(figures.probability), np.concatenate(figures.label))
            if name == "train":
                train = figures
        cut.close()
        dataset = Dataset(
            name=options.name or Path(dest).absolute().name,
            source=f"synthetic:{kind}, rows = {options.rows}, seed = {options.seed} ({planted.words})",
            labels=(planted.LABEL,),
            dense=train.dense(),
            categorical=train.categorical(),
            splits=splits,
            fingerprint=fingerprint(folder.path, splits, schema),
            bayes=bayes,
            positive_rate={planted.LABEL: float(np.concatenate(train.label).mean())},
            inputs=inputs,
        )
        folder.finish(dataset)
    return dataset


def share_out(rows: int, shares: tuple[tuple[str, float], ...]) -> dict[str, int]:
    """Rows of each split; what rounding leaves goes to the first.  (10, train .8, test .2) -> {train: 8, test: 2}."""
    sizes = {name: round(rows * share) for name, share in shares}
    first = shares[0][0]
    sizes[first] += rows - sum(sizes.values())
    empty = [name for name, size in sizes.items() if size < 1]
    if empty:
        raise UserError(f"rows = {rows} leaves no row for the split {empty[0]!r}; ask for more")
    return sizes


def bayes_of(probability_N: np.ndarray, label_N: np.ndarray) -> Bayes:
    """What the true probabilities score: expected over the labels, and on the labels drawn.

    auc = sum over pairs i, j of p_i (1 - p_j) ([p_i > p_j] + [p_i = p_j] / 2) / sum over pairs p_i (1 - p_j), i and j
    different rows; logloss = mean entropy in nats.  Exact in O(N log N): rows of equal p are one group, which meets
    the (1 - p) of the groups below it in full and half of its own pairs.  Example: p = [0.2, 0.8] -> auc = 0.64 / 0.68.
    """
    p, group_N, size = np.unique(probability_N, return_inverse=True, return_counts=True)
    n = size.astype(np.float64)
    positive, negative = n * p, n * (1.0 - p)
    below = np.cumsum(negative) - negative
    # A row is no pair with itself: it can not be positive and negative at once.
    itself = n * p * (1.0 - p)
    wins = (positive * below).sum() + 0.5 * (positive * negative - itself).sum()
    pairs = positive.sum() * negative.sum() - itself.sum()
    drawn = np.bincount(group_N, weights=label_N, minlength=len(p))
    others = n - drawn
    drawn_wins = (drawn * (np.cumsum(others) - others)).sum() + 0.5 * (drawn * others).sum()
    drawn_pairs = drawn.sum() * others.sum()
    tiny = np.finfo(np.float64).tiny  # keeps 0 * log 0 at 0
    log_p, log_q = np.log(np.maximum(p, tiny)), np.log(np.maximum(1.0 - p, tiny))
    return Bayes(
        auc=float(wins / pairs) if pairs > 0 else 0.5,
        logloss=float(-(positive * log_p + negative * log_q).sum() / n.sum()),
        sample_auc=float(drawn_wins / drawn_pairs) if drawn_pairs > 0 else 0.5,
        sample_logloss=float(-(drawn * log_p + others * log_q).sum() / n.sum()),
    )


class _Cutter:
    """Cuts the sequence of chunks into splits."""

    def __init__(self, chunks: Iterator[Chunk], done: Callable[[int], None]) -> None:
        self._chunks, self._done = chunks, done
        self._rest: Chunk | None = None
        self._rows = 0

    def take(self, rows: int) -> Iterator[Chunk]:
        while rows:
            chunk = self._rest if self._rest is not None else next(self._chunks)
            here = min(rows, len(chunk.label_N))
            self._rest = chunk.slice(here, None) if here < len(chunk.label_N) else None
            rows -= here
            self._rows += here
            yield chunk.slice(0, here)
            self._done(self._rows)

    def close(self) -> None:
        self._chunks.close()


class _Figures:
    """What is summed up over the chunks of a split."""

    def __init__(self, planted: Any) -> None:
        self._planted = planted
        self.probability: list[np.ndarray] = []
        self.label: list[np.ndarray] = []
        self._counts = {name: np.zeros(ids, np.int64) for name, ids in planted.features.items()}
        self._missing = dict.fromkeys((*planted.features, *planted.dense), 0)
        self._longest = dict.fromkeys(planted.features, 0)
        self._sums = {name: np.zeros(2) for name in planted.dense}
        self._rows = 0

    def add(self, chunk: Chunk) -> None:
        self.probability.append(chunk.probability_N)
        self.label.append(chunk.label_N)
        self._rows += len(chunk.label_N)
        for name, counts in self._counts.items():
            column = chunk.columns[name]
            listed = pa.types.is_list(column.type)
            ids_L = np.asarray(column.flatten() if listed else column.drop_null())
            counts += np.bincount(ids_L, minlength=len(counts))
            self._missing[name] += column.null_count
            longest = pc.max(pc.list_value_length(column)).as_py() if listed else int(len(ids_L) > 0)
            self._longest[name] = max(self._longest[name], longest or 0)
        for name, sums in self._sums.items():
            x_N = np.asarray(chunk.columns[name], np.float64)
            self._missing[name] += int((x_N == 0).sum())
            sums += (x_N.sum(), (x_N**2).sum())

    def dense(self) -> tuple[Dense, ...]:
        found = []
        for name, (total, squares) in self._sums.items():
            mean = total / self._rows
            std = max(0.0, squares / self._rows - mean**2) ** 0.5
            missing = self._missing[name]
            found.append(Dense(name=name, transform={"log1p": True}, missing=missing, mean=float(mean), std=float(std)))
        return tuple(found)

    def categorical(self) -> tuple[Categorical, ...]:
        return tuple(
            Categorical(
                name=name,
                cardinality=ids,
                multi_hot=name in self._planted.multi_hot,
                stats=make_stats(
                    self._counts[name], rows=self._rows, missing=self._missing[name], max_per_bag=self._longest[name]
                ),
            )
            for name, ids in self._planted.features.items()
        )
