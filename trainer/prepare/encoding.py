"""The encoding of a dataset: what gives new rows the ids and numbers that a model was trained on (`prepare --like`).

    DEST/encoding/encoding.json             what every column is made of, with the fitted numbers and bounds
    DEST/encoding/vocabulary_00000.parquet  one for each vocabulary: the 64-bit keys of ids 1, 2, ... in their order

It costs at most 8 bytes on disk for an id of a vocabulary, and nothing for a hash.
"""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kernels.errors import UserError
from trainer.data import dataset as dataset_json
from trainer.data.dataset import Frozen
from trainer.prepare.encode import Fitted, cardinality, is_bucketised, is_empty_when_missing, is_multi_hot
from trainer.prepare.ids import Vocabulary
from trainer.prepare.source import Reader
from trainer.prepare.spec import CategoricalColumns, DenseColumns, Label, Source, Spec, TimeColumn

FOLDER, FILE, VERSION = "encoding", "encoding.json", 1

Keys = Literal["integer", "text", "hex"]  # what the 64-bit keys of a vocabulary or hash are made from


class Feature(Frozen):
    name: str
    how: CategoricalColumns  # of its one column
    cardinality: int
    multi_hot: bool
    empty_when_missing: bool
    keys: Keys | None = None  # None: as_is or buckets
    bounds: tuple[float, ...] | None = None  # of buckets
    vocabulary: str | None = None  # file name
    digest: str | None = None  # of the vocabulary's keys


class Encoding(Frozen):
    version: int = VERSION
    source: Source
    labels: tuple[Label, ...]
    dense: tuple[DenseColumns, ...]  # one column each
    mean: dict[str, float]
    std: dict[str, float]
    features: tuple[Feature, ...]
    weight: str | None
    timestamp: TimeColumn | None

    @property
    def spec(self) -> Spec:
        """The spec for more rows of the same kind; it says nothing about splits."""
        return Spec(
            source=self.source,
            label=self.labels,
            dense=self.dense,
            categorical=tuple(feature.how for feature in self.features),
            weight=self.weight,
            timestamp=self.timestamp,
        )

    @property
    def fingerprint(self) -> str:
        """Equal where the same value becomes the same id or number: of how they are made, not of where they are read.

        The largest id of an as_is feature is left out: an id taken as it is means the same in a table of any size.
        """
        said = [[d.columns[0], d.log1p, self.mean.get(d.columns[0]), self.std.get(d.columns[0])] for d in self.dense]
        for f in self.features:
            hashed = [f.how.rows, f.how.seed] if f.keys and f.vocabulary is None else None
            said.append([f.name, f.keys, hashed, f.bounds, f.digest, f.multi_hot, f.empty_when_missing])
        return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()


def store(folder: Path, reader: Reader, spec: Spec, fitted: Fitted) -> Encoding:
    """Write the encoding below `folder`, a dataset that is being made."""
    roles = reader.roles
    (folder / FOLDER).mkdir()
    features = []
    for role in roles.categorical:
        own_name = {"name": role.name} if role.name != role.column else {}
        how = role.how.model_copy(update={"columns": (role.column,), **own_name})
        keyed = role.how.ids != "as_is" and not is_bucketised(role.how)
        file = digest = None
        if role.name in fitted.vocabulary:
            file = f"vocabulary_{len(features):05d}.parquet"
            keys = fitted.vocabulary[role.name].keys
            pq.write_table(pa.table({"key": keys}), folder / FOLDER / file, compression="zstd", use_dictionary=False)
            digest = _digest(keys)
        features.append(
            Feature(
                name=role.name,
                how=how,
                cardinality=cardinality(role, fitted),
                multi_hot=is_multi_hot(role, reader.lists),
                empty_when_missing=is_empty_when_missing(role, reader.lists),
                keys=reader.keys_of(role) if keyed else None,
                bounds=tuple(fitted.bounds[role.name].tolist()) if is_bucketised(role.how) else None,
                vocabulary=file,
                digest=digest,
            )
        )
    encoding = Encoding(
        source=spec.source,
        labels=tuple(role.how for role in roles.labels),
        dense=tuple(role.how.model_copy(update={"columns": (role.column,)}) for role in roles.dense),
        mean=fitted.mean,
        std=fitted.std,
        features=tuple(features),
        weight=spec.weight,
        timestamp=spec.timestamp,
    )
    (folder / FOLDER / FILE).write_text(encoding.model_dump_json(indent=1, exclude_defaults=True) + "\n")
    return encoding


def load(folder: str | Path) -> tuple[Encoding, Fitted]:
    """What `store` wrote.  UserError where the dataset has no encoding, or not the one its dataset.json speaks of."""
    dataset = dataset_json.load(folder)
    if dataset.like:
        raise UserError(f"like = {str(folder)!r}: was itself prepared like {dataset.like}; give that one")
    if dataset.encoding is None:
        raise UserError(
            f"like = {str(folder)!r}: keeps no encoding ({dataset.source}); "
            "only a dataset that was prepared from files does: prepare it again"
        )
    path = Path(folder) / FOLDER / FILE
    try:
        encoding = Encoding.model_validate_json(path.read_bytes())
        fitted = Fitted(mean=encoding.mean, std=encoding.std)
        for feature in encoding.features:
            if feature.vocabulary:
                path = Path(folder) / FOLDER / feature.vocabulary
                keys = np.asarray(pq.read_table(path).column("key").combine_chunks())
                if _digest(keys) != feature.digest:
                    raise ValueError("the keys are not those that were written")
                fitted.vocabulary[feature.name] = Vocabulary.in_order(keys)
            elif feature.bounds is not None:
                fitted.bounds[feature.name] = np.asarray(feature.bounds)
            elif feature.how.ids == "hash64":
                fitted.distinct[feature.name] = feature.cardinality
            elif feature.how.ids == "as_is":
                fitted.largest[feature.name] = feature.cardinality - 1
        if encoding.fingerprint != dataset.encoding:
            raise ValueError("not the encoding that dataset.json speaks of")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be used: {error}; prepare {folder} again") from error
    return encoding, fitted


def check_source(encoding: Encoding, reader: Reader) -> None:
    """UserError where a column holds one id a row and a list in the other dataset, or the other way round."""
    known = {feature.name: feature for feature in encoding.features}
    for role in reader.roles.categorical:
        if is_multi_hot(role, reader.lists) != known[role.name].multi_hot:
            now, then = ("lists", "one value a row") if role.column in reader.lists else ("one value a row", "lists")
            raise UserError(
                f"{reader.files[0].path}: column {role.column!r} holds {now}, and held {then} in the dataset that this "
                "one is to be like; write it as it was there"
            )


def _digest(keys: np.ndarray) -> str:
    return hashlib.blake2b(keys.astype("<u8").tobytes(), digest_size=16).hexdigest()
