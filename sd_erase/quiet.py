"""What the libraries are told before they are imported: look no host up, send nothing, write nothing beside the run.

Left alone, ultralytics asks two name servers whether it is online and keeps settings in the home folder, onnxruntime (which diffusers
imports where it finds it) keeps a device's number there and reports to its maker, matplotlib keeps a list of fonts, and torch makes a
folder for what it may compile. Only what is asked for as a model is fetched. The user's own environment variables win.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator

ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "YES",  # diffusers and transformers
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime
    "YOLO_OFFLINE": "true",  # ultralytics
    "YOLO_AUTOINSTALL": "false",
    "YOLO_VERBOSE": "false",
    "ULTRALYTICS_SAFE_LOAD": "true",
}


def libraries() -> None:
    """Set what every library reads; called once, before any of them is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def process() -> None:
    """The same for a process of our own."""
    libraries()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.gettempdir())  # nothing is compiled: no folder of its own


@functools.cache
def figures() -> None:
    """Before matplotlib (or torchmetrics, which imports it): its list of fonts goes into a folder that this process removes."""
    if "MPLCONFIGDIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="sd-erase-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = folder


@contextlib.contextmanager
def settings_elsewhere() -> Iterator[None]:
    """ultralytics writes its settings when it is imported: into a folder that is gone afterwards."""
    if "YOLO_CONFIG_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="sd-erase-") as folder:
        os.environ["YOLO_CONFIG_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["YOLO_CONFIG_DIR"]
