"""Checkpoints as models and back: names, configs, and the published files, which carry no config.

A checkpoint is a dict with `model` (and perhaps `ema`): state dicts under the released names, `vae.*` for the S-VAE.
"""

from dataclasses import asdict, fields, replace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.spherear import PRESETS, SphereAR, SphereARConfig
from models.svae import SVAE, SVAEConfig

Config = SVAEConfig | SphereARConfig
MAX_SIZE, MAX_FLOAT = 2**20, 1e30  # of whole and other numbers in a config
SIZE = "num_layers", "width", "head_blocks", "head_width", "head_adaln_sets"  # of a preset, as the weights show it


def config_to_dict(config: Config) -> dict:
    """Plain dict of a config, as it travels inside a checkpoint."""
    return asdict(config)


def config_from_dict(values: dict) -> Config:
    """The config that `config_to_dict` wrote. Raises ValueError for unknown or missing fields, and wrong values."""
    if not isinstance(values, dict):
        raise ValueError(f"not a SphereAR or S-VAE config: {str(values)[:80]}")
    try:
        values = dict(values)
        svae = values.pop("svae", None)
        if svae is None:
            return _checked(SVAEConfig, {**values, "stem_channels": tuple(values["stem_channels"])})
        return _checked(SphereARConfig, {**values, "svae": config_from_dict(svae)})
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a SphereAR or S-VAE config: {error}") from error


def _checked(kind: type[Config], values: dict) -> Config:
    """A config of values that have its fields' types, its whole numbers in 1 to MAX_SIZE."""
    for field in fields(kind):
        value = values.get(field.name, field.default)
        parts = value if isinstance(value, tuple) else (value,)
        if field.type in (int, tuple[int, ...]):
            is_right = all(type(part) is int and 1 <= part <= MAX_SIZE for part in parts)
        elif field.type in (float, float | None):
            is_number = type(value) in (int, float) and -MAX_FLOAT < value < MAX_FLOAT
            is_right = is_number or (value is None and field.type is not float)
        else:
            is_right = isinstance(value, field.type)
        if not is_right and field.name in values:
            raise ValueError(f"not a SphereAR or S-VAE config: {field.name} is {str(value)[:80]}")
    return kind(**values)


def build(config: Config) -> SphereAR | SVAE:
    """The model of a config, freshly initialised."""
    return SVAE(config) if isinstance(config, SVAEConfig) else SphereAR(config)


def checkpoint_state(model: SphereAR | SVAE, changes: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state dict, with `changes` to it, under the released names (an S-VAE's carry the prefix `vae.`)."""
    state = model.state_dict() | (changes or {})
    return {f"vae.{name}": value for name, value in state.items()} if isinstance(model, SVAE) else state


def own_names(model: SphereAR | SVAE, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of released names under the model's own: what `checkpoint_state` changed, back."""
    if isinstance(model, SVAE):
        return {name.removeprefix("vae."): value for name, value in state.items() if name.startswith("vae.")}
    return state


def load_state(model: SphereAR | SVAE, state: dict[str, Tensor], assign: bool = False) -> None:
    """Load a state dict of released names, strictly; `assign` takes its tensors instead of copying them.

    Raises ValueError where names or shapes are not the model's.
    """
    own, state = model.state_dict(), own_names(model, state)
    wrong = {
        "missing": own.keys() - state.keys(),
        "unknown": state.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape},
    }
    if any(wrong.values()):
        told = "; ".join(f"{len(names)} {what} ({min(names)})" for what, names in wrong.items() if names)
        raise ValueError(f"the weights do not fit the architecture: {told}")
    model.load_state_dict(state, strict=True, assign=assign)


def preset_of(config: SphereARConfig) -> str | None:
    """The preset whose size the config has; S-VAE, classes and the values of training may be others."""
    return next((name for name, preset in PRESETS.items() if _size(preset) == _size(config)), None)


def _size(config: SphereARConfig) -> tuple[int, ...]:
    return config.num_heads, *(getattr(config, name) for name in SIZE)


def infer_config(state: dict[str, Tensor]) -> Config:
    """The config of a state dict of released names, from its shapes.

    They do not show the AR model's number of attention heads: it is the preset's of that size. ValueError where there
    is none, and for other weights.
    """
    try:
        svae = _infer_svae(state)
        if "cls_embedding.weight" not in state:
            return svae
        rows, class_width = state["cls_embedding.weight"].shape
        width = len(state["norm.weight"])
        head_width, _ = state["head.net.input_proj.weight"].shape
        layers, blocks, sets = (
            _count(state, prefix) for prefix in ("layers.", "head.net.res_blocks.", "head.net.ada_ln_blocks.")
        )
        size = dict(zip(SIZE, (layers, width, blocks, head_width, sets)))
        changes = {"svae": svae, "num_classes": rows - 1, "num_class_tokens": class_width // width}
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the weights are not SphereAR's or an S-VAE's: {error}") from error
    for preset in PRESETS.values():
        if all(getattr(preset, name) == value for name, value in size.items()):
            return replace(preset, **changes)
    told = ", ".join(f"{name} {value}" for name, value in size.items())
    raise ValueError(
        f"the weights come without a config and are of no preset's size ({told}): their number of attention heads is "
        f"not known; add the entry 'config' (models.config_to_dict), or give weights of {', '.join(PRESETS)}"
    )


def _infer_svae(state: dict[str, Tensor]) -> SVAEConfig:
    prefix = "vae.encoder.patchify.0.net."
    stem = [len(state["vae.encoder.conv_in.weight"])]
    stem += [len(state[f"{prefix}{i}.shortcut.weight"]) for i in range(_count(state, prefix))]
    positions, half_head, _ = state["vae.encoder.freqs_cis"].shape
    registers, width = state["vae.encoder.register_token.weight"].shape
    grid = round((positions - registers) ** 0.5)
    patch_size = 2 ** (len(stem) - 1)
    return SVAEConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        latent_dim=state["vae.post_quant_proj.weight"].shape[1],
        width=width,
        num_heads=width // (2 * half_head),
        encoder_layers=_count(state, "vae.encoder.layers."),
        decoder_layers=_count(state, "vae.decoder.layers."),
        num_registers=registers,
        stem_channels=tuple(stem),
    )


def _count(state: dict[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def from_checkpoint(checkpoint: dict, ema: bool = True) -> SphereAR | SVAE:
    """The model in a checkpoint, on the CPU, in eval mode; EMA weights if it has any and `ema` is set.

    Ours carry their config; published ones are recognised from their shapes. The model's weights are copies. Raises
    ValueError for a checkpoint of another kind. Weights of other float types become float32.
    """
    state = (checkpoint.get("ema") if ema else None) or checkpoint["model"]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError("the weights are not SphereAR's or an S-VAE's: no tensors by their names")
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_complex():
            raise ValueError(f"the weights are not SphereAR's or an S-VAE's: {name[:80]} is no plain tensor")
        if not value.is_floating_point():
            raise ValueError(f"the weights are not SphereAR's or an S-VAE's: {name[:80]} is {value.dtype}")
    state = {
        name.removeprefix("module.").removeprefix("_orig_mod."): value.to(torch.float32, copy=True)
        for name, value in state.items()
    }
    config = config_from_dict(checkpoint["config"]) if "config" in checkpoint else infer_config(state)
    if max(_layers(config)) > len(state):  # before they are all made
        raise ValueError(f"the config has {max(_layers(config))} layers, the weights are {len(state)} tensors")
    if _largest_rope(config) > sum(value.numel() for value in state.values()):  # which is real even on meta
        raise ValueError(f"the config has {_tokens(config)} tokens, more than the weights are made for")
    with torch.device("meta"), _WithoutInit():
        model = build(config)
    load_state(model, state, assign=True)
    return model.eval().requires_grad_(False)


def _tokens(config: Config) -> int:
    return (config.svae if isinstance(config, SphereARConfig) else config).num_tokens


def _largest_rope(config: Config) -> int:
    """How many numbers the largest table of rotation angles has: never more than the weights that belong to it."""
    svae = config.svae if isinstance(config, SphereARConfig) else config
    sizes = [(svae.num_registers + svae.num_tokens) * svae.width // svae.num_heads]
    if isinstance(config, SphereARConfig):
        sizes.append((config.num_class_tokens + svae.num_tokens) * config.width // config.num_heads)
    return max(sizes)


class _WithoutInit(TorchFunctionMode):
    """torch.nn.init does nothing: without it no weights are drawn, for which torch would load its compiler (1 s)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def _layers(config: Config) -> list[int]:
    own = [config.num_layers, config.head_blocks] if isinstance(config, SphereARConfig) else []
    svae = config.svae if isinstance(config, SphereARConfig) else config
    return [*own, svae.encoder_layers, svae.decoder_layers]
