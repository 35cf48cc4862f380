"""The folder behind a result: a run like any other, under the system's temporary folder, gone with the result."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from sd_erase import bases
from sd_erase.api import models
from sd_erase.config import RunConfig
from sd_erase.progress import NoProgress, Progress, RichProgress
from sd_erase.rundir import RunDir
from sd_erase.stages import run_stage


class Scratch:
    """A base that lay in memory, and the run that erased from it.

    Args:
        model: the pipeline or text encoder; it is only read.
        tokenizer: of a text encoder.
    """

    def __init__(self, model: Any, tokenizer: Any = None, weights: bool = True):
        self._model = model
        self._whole = False
        self._folder = tempfile.TemporaryDirectory(prefix="sd-erase-")  # removed when this object is, or Python ends
        self.path = Path(self._folder.name)
        self.base = self.path / models.name_of(model)
        models.write_base(model, self.base, tokenizer, weights)
        self.card = bases.resolve(str(self.base))  # refuses models of other kinds by name
        self.config = RunConfig(base=str(self.base))
        self.run = RunDir(self.path)

    def begin(self, config: RunConfig, stem: str) -> None:
        """Take `config` as the settings of a run that is called `stem`."""
        self.config, self.run = config, RunDir.next(self.path / "runs", stem, self.card.name)

    def complete(self) -> None:
        """Have the denoiser and the autoencoder in the base too."""
        if not self._whole:
            models.write_rest(self._model, self.base)
            self._whole = True

    def do(self, stage: str, progress: Progress, config: RunConfig | None = None) -> dict[str, Any]:
        """The result of one stage of the run."""
        return run_stage(stage, config or self.config, self.run, progress)

    def thin(self) -> None:
        """Remove what only a training that goes on would need."""
        for folder in (self.run.checkpoints, self.run.cache):
            shutil.rmtree(folder, ignore_errors=True)


def shown(progress: bool | Progress) -> Progress:
    """Bars on stderr for True, none for False, or a progress of the caller's own."""
    if isinstance(progress, bool):
        return RichProgress() if progress else NoProgress()
    return progress
