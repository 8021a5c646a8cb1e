"""Where a model comes from: a folder, a GGUF file, an installed package or the Hub."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import HTTPError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from yaml import YAMLError

from .errors import FlexdistillError, explained
from .loading import checked_settings, load_weights
from .progress import progress_bars_on_terminals_only
from .runtime.configuration_flexformer import MODEL_TYPE
from .storage import expanded

PACKAGE_PREFIX = "package:"


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds a model.

    Args:
        name: what the user wrote.
        path_or_id: folder or Hub id.
        gguf_file: name of the GGUF file in that folder; None for safetensors.
        hub_id: Hub id for the model card; None for a local model.
    """

    name: str
    path_or_id: str
    gguf_file: str | None = None
    hub_id: str | None = None


def resolve_model(name: str) -> ModelSource:
    """Finds what a model name means, without a network: a folder, a .gguf file, `package:NAME`, else a Hub id.

    Raises:
        FlexdistillError: if a path does not exist or holds no model, or a package is not installed or holds no model or
            several.
    """
    if name.startswith(PACKAGE_PREFIX):
        return _resolve_package(name)
    path = expanded(name)
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise FlexdistillError(
                f"Folder {name} has no config.json; give one written by save_pretrained, or a .gguf file by its path."
            )
        return ModelSource(name, str(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise FlexdistillError(f"File {name} is not a .gguf file; give the folder that holds its config.json.")
        return ModelSource(name, str(path.parent), gguf_file=path.name)
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise FlexdistillError(
            f"Model {name!r} does not exist; check the path, or give a Hub id or {PACKAGE_PREFIX}NAME."
        )
    return ModelSource(name, name, hub_id=name)


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Loads the configuration of a model that is not converted yet.

    Raises:
        FlexdistillError: if it is missing, damaged, of an unknown type or converted already, or needs remote code.
    """
    with _explained(source):
        settings = checked_settings(source.path_or_id, source.gguf_file)
        if settings.get("model_type") == MODEL_TYPE:
            raise FlexdistillError(f"Model {source.name!r} is converted already; give the model it was made from.")
        if source.gguf_file:
            return CONFIG_MAPPING[settings["model_type"]].from_dict(settings)
        return AutoConfig.from_pretrained(source.path_or_id, trust_remote_code=trust_remote_code)


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    auto_class: type | None = None,
) -> PreTrainedModel:
    """Loads a model from safetensors or GGUF, never from pickled weights.

    Args:
        source: from `resolve_model`.
        dtype: of the weights in memory; GGUF weights are dequantised to it.
        trust_remote_code: run code that the model ships.
        auto_class: class to load with; None for the architecture that config.json names, a causal LM for GGUF.

    Returns:
        The model in eval mode, which `save_pretrained` can write.

    Raises:
        FlexdistillError: if the model cannot be found or read, or its file lacks weights.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    folder = Path(source.path_or_id)
    if source.gguf_file is None and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise FlexdistillError(
            f"Folder {source.name} has no *.safetensors weights; load its weights with "
            "transformers and write them with save_pretrained."
        )
    with _explained(source), progress_bars_on_terminals_only():
        if auto_class is None:
            auto_class = AutoModelForCausalLM if source.gguf_file else _architecture(config, source, trust_remote_code)
        model = load_weights(
            auto_class,
            source.path_or_id,
            config=config,
            file=source.gguf_file,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        return _unquantized(model, config, dtype) if source.gguf_file else model


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer; its eos token pads where it has no pad token.

    Raises:
        FlexdistillError: if the tokenizer is missing or damaged.
    """
    with _explained(source, "Tokenizer of "):
        checked_settings(source.path_or_id, source.gguf_file)  # transformers reads them for the tokenizer's class
        tokenizer = AutoTokenizer.from_pretrained(
            source.path_or_id, gguf_file=source.gguf_file, trust_remote_code=trust_remote_code
        )
        tokenizer("Miss Brooke")  # what does not fit together shows in use
    # without tokenizer files transformers makes one that knows its special tokens only and turns text into nothing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise FlexdistillError(
            f"Model {source.name!r} has no tokenizer files; copy tokenizer.json beside its config.json."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_card(source: ModelSource) -> ModelCardData:
    """What the README.md of a model states about it; empty where there is none, or none that can be read or reached."""
    folder = Path(source.path_or_id)
    try:
        readme = folder / "README.md" if folder.is_dir() else hf_hub_download(source.path_or_id, "README.md")
        data = ModelCard.load(readme, ignore_metadata_errors=True).data
        if isinstance(data.language, list):  # YAML takes Norwegian's code for a boolean
            data.language = ["no" if code is False else code for code in data.language]
        elif data.language is False:
            data.language = "no"
        return data
    except (OSError, HTTPError, ValueError, YAMLError):
        return ModelCardData()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest token id; some tokenizers leave ids out."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that every token id has an input embedding.

    Raises:
        FlexdistillError: if the tokenizer has more tokens than the embedding has rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    size = vocabulary_size(tokenizer)
    if size > rows:
        raise FlexdistillError(
            f"The tokenizer has token ids up to {size - 1} and the model has {rows} input embeddings; "
            "give the tokenizer that belongs to the model."
        )


def _resolve_package(name: str) -> ModelSource:
    package = name.removeprefix(PACKAGE_PREFIX)
    folders = _package_folders(package)
    ggufs = {path for folder in folders for path in folder.rglob("*.gguf")}
    configs = {path.parent for folder in folders for path in folder.rglob("config.json")}
    models = sorted(ggufs | {folder for folder in configs if any(folder.glob("*.safetensors"))})
    if not models and (joined := _joined_pieces(package)):
        models = [joined]
    if not models:
        raise FlexdistillError(
            f"Package {package!r} holds no model, neither *.gguf nor a config.json beside *.safetensors; "
            "give a package that ships one."
        )
    if len(models) > 1:
        raise FlexdistillError(
            f"Package {package!r} holds several models; give one by its path: {', '.join(map(str, models))}."
        )
    (model,) = models
    return ModelSource(name, str(model)) if model in configs else ModelSource(name, str(model.parent), model.name)


def _joined_pieces(package: str) -> Path | None:
    """A GGUF file of pieces NAME.gguf.part00, part01 ... in a package and those that it requires, joined in the cache.

    Raises:
        FlexdistillError: if a piece is missing.
    """
    try:
        requirements = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    unconditional = (re.match(r"[\w.-]+", requirement) for requirement in requirements if ";" not in requirement)
    names = [package, *(name[0] for name in unconditional if name)]
    found = {path for name in names for folder in _package_folders(name) for path in folder.rglob("*.gguf.part*")}
    pieces = sorted(found, key=lambda path: path.name)
    if not pieces:
        return None
    expected = [f"{pieces[0].stem}.part{number:02d}" for number in range(len(pieces))]
    if [path.name for path in pieces] != expected:
        raise FlexdistillError(
            f"Package {package!r} and those that it requires hold {', '.join(path.name for path in pieces)}, which are "
            "not all pieces of one file; install the package again with its dependencies."
        )
    joined = Path(HF_HOME) / "flexdistill" / pieces[0].stem
    if not joined.is_file() or joined.stat().st_size != sum(path.stat().st_size for path in pieces):
        joined.parent.mkdir(parents=True, exist_ok=True)
        aside = joined.with_suffix(".joining")
        with aside.open("wb") as file:
            for path in pieces:
                with path.open("rb") as piece:
                    shutil.copyfileobj(piece, file)
        aside.replace(joined)
    return joined


def _package_folders(package: str) -> list[Path]:
    """Folders of an installed package, by the name it is imported or installed under, without importing it."""
    module = package.replace("-", "_")
    try:
        spec = importlib.util.find_spec(module) if module.isidentifier() else None
        if spec is not None and spec.submodule_search_locations:
            return [Path(folder) for folder in spec.submodule_search_locations]
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise FlexdistillError(f"Package {package!r} is not installed; check its name, or install it.") from error
    inside = [file for file in files if len(file.parts) > 1 and ".." not in file.parts]
    return sorted({Path(file.locate()).parents[len(file.parts) - 2] for file in inside})


def _architecture(config: PreTrainedConfig, source: ModelSource, trust_remote_code: bool) -> type:
    if not config.architectures:
        raise FlexdistillError(
            f"Model {source.name!r} names no `architectures` in its config.json; add the class that was saved."
        )
    name = config.architectures[0]
    if trust_remote_code:
        for auto_class, reference in (getattr(config, "auto_map", None) or {}).items():
            if isinstance(reference, str) and reference.endswith(f".{name}"):
                return getattr(transformers, auto_class)
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise FlexdistillError(
            f"Model {source.name!r} is a {name}, which transformers {transformers.__version__} lacks; update it, or "
            "set trust_remote_code if the model ships code that you trust."
        )
    return architecture


def _unquantized(model: PreTrainedModel, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    # a model read from GGUF stays marked as quantised, which forbids saving it, although its weights are plain
    plain = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype)
    plain.generation_config = model.generation_config
    return plain


def _explained(source: ModelSource, what: str = "Model ") -> AbstractContextManager[None]:
    if source.gguf_file:
        remedy = "check that the file is complete and of an architecture that transformers reads from GGUF"
    elif source.hub_id is None:
        remedy = "check that config.json, *.safetensors and the tokenizer files are complete"
    else:
        remedy = (
            "check the Hub id, that it has safetensors weights, the network and, if it is gated, HF_TOKEN, or give "
            f"a local folder, a .gguf file or {PACKAGE_PREFIX}NAME"
        )
    of_code = "read the code that it ships and set trust_remote_code if you trust it"
    return explained(
        f"{what}{source.name!r} cannot be loaded",
        lambda error: of_code if "trust_remote_code" in str(error) else remedy,
    )
