"""Where a model's files lie: a local folder as it is, a hub id in the libraries' own cache, fetched where it is not there yet.

Of a hub id the small files (configurations, tokenizers) come first, the weights of a component when it is loaded. What was fetched
once is not asked for again: a model does not change under a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd_erase.errors import UserError
from sd_erase.modelfiles import INDEX
from sd_erase.weights import choose_files, component_files

SMALL = ("*.json", "*/*.json", "*/merges.txt", "merges.txt", "vocab.txt", "README.md")
ADVICE = "pass a local diffusers folder or a .safetensors checkpoint with --base, or --base pocket"


def hub_fault(identifier: str, file: str, kind: str = "model") -> str:
    """Why nothing can be fetched from the hub's `identifier`, "" where it can or where `file` was fetched before.

    One short request: the libraries try for most of a minute.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or isinstance(huggingface_hub.try_to_load_from_cache(identifier, file, repo_type=kind), str):
        return ""
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(identifier, file, repo_type=kind), timeout=10)
    except errors.EntryNotFoundError:  # the hub answers; that file may have another name there
        return ""
    except Exception as error:  # no network, no such model, no access, no valid identifier
        return type(error).__name__
    return ""


def is_identifier(name: str) -> bool:
    """Whether the hub may hold a model of this name, as OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not listed

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def folder_of(source: str, advice: str = ADVICE) -> Path:
    """The folder of a model: `source` itself, or that of a hub id's small files.

    Raises:
        UserError: the hub cannot be reached, or has no such model.
    """
    path = Path(source).expanduser()
    return path if path.exists() else cached(source) or _fetch(source, advice)


def cached(identifier: str) -> Path | None:
    """The folder of a hub id that was fetched before, with its components' configurations."""
    import huggingface_hub

    for name in (INDEX, "config.json"):
        try:
            file = huggingface_hub.try_to_load_from_cache(identifier, name)
        except ValueError:  # no valid identifier
            return None
        if isinstance(file, str):
            folder = Path(file).parent
            parts = [part for part in ("unet", "text_encoder", "text_encoder_2") if (folder / part).is_dir()]
            # another program may have fetched the index alone
            if name != INDEX or (parts and all((folder / part / "config.json").is_file() for part in parts)):
                return folder
    return None


def _fetch(identifier: str, advice: str) -> Path:
    """The small files of a hub id."""
    import huggingface_hub
    from huggingface_hub import constants

    fault = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else hub_fault(identifier, INDEX)
    if not fault:
        try:
            return Path(huggingface_hub.snapshot_download(identifier, allow_patterns=list(SMALL)))
        except Exception as error:  # of many kinds: the network's, the hub's, the disk's
            fault = type(error).__name__
    raise UserError(f"Model {identifier} cannot be fetched from the hub ({fault}): {advice}.")


def weight_files(source: str, component: str, stem: str, what: str, advice: str = ADVICE) -> list[Path]:
    """The safetensors files of a component; of a hub id they are fetched.

    Args:
        component: its folder; "" where the model has no others.
        stem: see `weights.choose_files`.
        what: the component and its model, for the error.

    Raises:
        UserError: there are none, a part is missing, or the hub cannot be reached.
    """
    folder = folder_of(source, advice)
    if Path(source).expanduser().exists():
        return component_files(folder / component, stem, what)
    import huggingface_hub

    try:
        return component_files(folder / component, stem, what)
    except UserError:  # not fetched yet, or not all
        pass
    prefix = f"{component}/" if component else ""
    try:
        listed = huggingface_hub.list_repo_files(identifier := source, revision=(commit := folder.name))
        names = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
        chosen = choose_files(names, stem, what)
        return [Path(huggingface_hub.hf_hub_download(identifier, prefix + name, revision=commit)) for name in chosen]
    except UserError:
        raise
    except Exception as error:  # of many kinds: the network's, the hub's, the disk's
        raise UserError(f"{what} cannot be fetched from the hub ({type(error).__name__}): {advice}.") from error


class loading:  # noqa: N801 (used as a function)
    """Turn the libraries' many errors, as they read the small files of `source`, into one sentence about it."""

    def __init__(self, source: str):
        self.source = source

    def __enter__(self) -> loading:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):
            logging.disable_progress_bar()  # sd-erase shows its own
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        text = " ".join(str(error).split())[:200]
        if isinstance(error, PermissionError):
            cause = f"{error.filename or 'one of its files'} may not be read ({error.strerror}): give yourself the right to"
        elif isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text.lower():
            cause = "it does not fit into memory: close other programs, or take a smaller model"
        elif isinstance(error, (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, ImportError)):
            cause = f"{type(error).__name__}: {text}: its files do not describe a model that the installed libraries know"
        else:
            return
        raise UserError(f"Model {self.source} cannot be loaded, {cause}.") from error
