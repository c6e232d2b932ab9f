"""Names of networks, and model files: what a network is called, how it is saved and read."""
import json
from dataclasses import asdict, fields, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .ablations import CEAConfig
from .adapters import FAMILIES, DescriptorConfig, ExpertsConfig, MLPConfig, PromptConfig
from .checkpoints import load_pth, nafnet_options
from .nafnet import NAFNetConfig, shapes
from .params import Params, copy_into, metadata_in, save, tensors_in
from .runtime import InputError, read_bytes

WEIGHTS = Path(__file__).parent / "weights" / "default.safetensors"
# Names for the command line. The rivals match CEA's number of parameters within 5 % in the default network, see lab/comparison.
ADAPTERS = {"none": NAFNetConfig(adapter=None), "wider": NAFNetConfig(adapter=None, width=27)} | {
    name: NAFNetConfig(adapter=adapter) for name, adapter in {
        "cea": CEAConfig(), "cea-softmax": CEAConfig(affinity="softmax"), "cea-topk": CEAConfig(affinity="topk"),
        "cea-image": CEAConfig(level="image"), "cea-static-A": CEAConfig(static="A"), "cea-static-U": CEAConfig(static="U"),
        "cea-static": CEAConfig(static="AU", tokens="Xhat"), "mlp": MLPConfig(), "descriptor": DescriptorConfig(),
        "static": CEAConfig(static="AU", rank=76, norm="token", tokens="Xhat"), "prompt": PromptConfig(),
        "experts-image": ExpertsConfig(level="image"), "experts-token": ExpertsConfig(level="token")}.items()} | {
    "told": NAFNetConfig(adapter=None, told=15)}


@cache
def network(name):
    """The network called `name`: one of ADAPTERS, with options of its adapter or of NAFNetConfig as in "cea:rank=16,sca=false".

    Several values are joined by +, as in "cea:slots=encoders.0+middle_blks" or "cea:encoders=1+1,decoders=1+1". InputError for an
    unknown name, option or value.
    """
    name, _, options = name.partition(":")
    if name not in ADAPTERS:
        raise InputError(f"unknown adapter {name!r}: choose one of {', '.join(ADAPTERS)}")
    config = ADAPTERS[name]
    own, whole = ([field.name for field in fields(c)] if c else [] for c in (config.adapter, config))
    of_adapter, of_network = {}, {}
    for option in filter(None, options.split(",")):
        key, _, text = option.partition("=")
        if key not in own + whole or key == "adapter":
            raise InputError(f"unknown option {option!r} of adapter {name}: choose among {', '.join(own + whole)}")
        value = tuple(map(_literal, text.split("+"))) if key in ("slots", "encoders", "decoders") else _literal(text)
        (of_adapter if key in own else of_network)[key] = value
    return replace(config, adapter=config.adapter and replace(config.adapter, **of_adapter), **of_network)


def _literal(text):
    """A number, true or false; any other text is itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


# ---- model files -----------------------------------------------------------------------------------------------------

def save_model(path, p, config, **metadata):
    """Write parameters and their configuration to a safetensors file."""
    save(path, p, config=to_dict(config), **metadata)


class Model(NamedTuple):
    """A network ready to run: parameters and configuration."""
    p: Params
    config: NAFNetConfig


def load_model(path: str | Path, local: int | None = None) -> Model:
    """Read a model file: tinycea's, or a NAFNet's as PyTorch's .pth or safetensors. InputError for anything else, by name.

    local: pixels a side of its training patches, for averages over windows of 1.5 times that (TLC, `NAFNetConfig.local`).
    """
    data = read_bytes(path, 2**32)
    tensors, options = load_pth(path, data) if data[:2] == b"PK" else tensors_in(path, data), None
    if b'"tinycea"' not in data[8:8 + int.from_bytes(data[:8], "little")]:
        tensors, options = nafnet_options(path, tensors)
    try:
        config = NAFNetConfig(**options) if options else from_dict(metadata_in(path, data)["config"])
        config = replace(config, local=config.local if local is None else local)
        p = Params(shapes(config), np.float64 if all(value.dtype == np.float64 for value in tensors.values()) else np.float32)
    except (KeyError, TypeError, AttributeError, ValueError, MemoryError, OverflowError) as error:
        raise InputError(f"{path}: holds no configuration of a model that this tinycea knows ({error})") from None
    copy_into(p, tensors, path)
    return Model(p, config)


def to_dict(config):
    """A NAFNetConfig as JSON takes it; the adapter's dict names its family."""
    names = {family.config: name for name, family in FAMILIES.items()}
    adapter = config.adapter and {"family": names[type(config.adapter)]} | asdict(config.adapter)
    return asdict(config) | {"adapter": adapter}


def from_dict(values):
    """The NAFNetConfig whose `to_dict` went through JSON (lists become tuples again)."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if values["adapter"] is not None:
        options = {"norm": "token"} | values["adapter"]           # older files do not name the norm
        values["adapter"] = FAMILIES[options.pop("family")].config(**options)
    return NAFNetConfig(**values)


