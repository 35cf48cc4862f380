"""The data sets that are known by name: where their caption files lie in a folder. What a file holds tells how it is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_erase.captions import arrow, shards
from sd_erase.captions.caption import Caption, Tally, checked
from sd_erase.captions.files import find_file
from sd_erase.captions.form import SHAPES, read_file
from sd_erase.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """A data set of one caption file, or of shards.

    Attributes:
        what: what it is called in messages.
        names: globs of its caption file, the first that is there is read.
        archives: the shards that are read in place of a caption file: "parquet" first of all, or "tar".
        folders: names of folders that its images may lie in, beside those that all data sets use.
    """

    what: str
    names: tuple[str, ...]
    archives: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def __call__(
        self, path: Path, folder: Path | None = None, wanted: Collection[str] | None = None, tally: Tally | None = None, **_: Any
    ) -> Iterator[Caption]:
        """The captions of `path`, a file of any form that is read, or a folder that holds one of this data set's.

        Raises:
            UserError: no such file, or a damaged one.
        """
        tally = Tally() if tally is None else tally
        kind, files = self._shards(path)
        if kind == "parquet":
            yield from checked(arrow.read(files, tally, folder, wanted), path, SHAPES["arrow"], tally)
        elif kind == "tar":
            yield from checked(shards.read(files, tally, folder, wanted), path, SHAPES["shard"], tally)
        else:
            file = self._find(path, tally)
            yield from read_file(file, tally, folder, wanted, (*self.folders, *_folders_of(file)))

    def _shards(self, path: Path) -> tuple[str, list[Path]]:
        for kind in self.archives if path.is_dir() else ():
            files = arrow.files_of(path) if kind == "parquet" else sorted(path.glob("*.tar"))
            if files:
                return kind, files
        return "", []

    def _find(self, path: Path, tally: Tally | None = None) -> Path:
        try:
            return find_file(path, self.names, self.what, tally)
        except UserError as error:
            others = [name for name, other in DATA_SETS.items() if other is not self and other.holds(path)]
            hint = f" What it holds is read with {' or '.join(f'--dataset {name}:{path}' for name in others)}." if others else ""
            raise UserError(f"{error}{hint}") from error

    def holds(self, path: Path) -> bool:
        """Whether a folder holds this data set, as far as names tell."""
        return bool(self._shards(path)[1]) or any(True for name in self.names for _ in path.glob(name))

    def files(self, path: Path) -> list[Path]:
        """The files that are read."""
        return self._shards(path)[1] or [self._find(path)]


def _folders_of(file: Path) -> tuple[str, ...]:
    """COCO's images lie in train2017/ or images/train2017/, as its captions_train2017.json says."""
    year = file.stem.replace("captions_", "").split("_text")[0]
    return (year, f"images/{year}") if year != file.stem else ()


flickr30k = DataSet(
    "Flickr30K captions",
    ("results_20130124*.token", "results_20130124*.token.gz", "*.token", "*.token.gz", "dataset_flickr30k.json", "results.csv",
     "flickr30k_*.json", "*/dataset_flickr30k.json", "*/results.csv"),
    archives=("parquet",),
)  # fmt: skip
flickr8k = DataSet(
    "Flickr8k captions",
    ("captions.csv", "captions.txt", "*.csv", "Flickr8k.token.txt", "*.token.txt", "dataset_flickr8k.json"),
)
coco = DataSet(
    "COCO captions",
    ("captions_*.json", "annotations/captions_*.json", "dataset_coco.json", "coco_*.json", "*.json"),
    archives=("parquet",),
)
cc12m = DataSet(
    "Conceptual Captions TSV, .tar shards or parquet",
    ("*.tsv", "*.tsv.gz"),
    archives=("tar", "parquet"),  # img2dataset writes a parquet file of the same captions beside each shard
)
json_lines = DataSet("JSON Lines file", ("metadata.jsonl", "*.jsonl", "*.jsonl.gz", "*.ndjson", "meta_cap.json", "*.json"))
DATA_SETS = {"flickr30k": flickr30k, "flickr8k": flickr8k, "coco": coco, "cc12m": cc12m, "jsonl": json_lines}
