"""SphereAR's models: the sphere, the S-VAE, the AR transformer, its diffusion head, and generation."""

from models.checkpoint import (
    build,
    checkpoint_state,
    config_from_dict,
    config_to_dict,
    from_checkpoint,
    load_state,
    own_names,
    preset_of,
)
from models.generation import Phases, SamplingSettings, decode, encode, generate_tokens
from models.sphere import HypersphericalUniform, PowerSpherical, project_to_sphere
from models.spherear import PRESETS, SphereAR, SphereARConfig
from models.svae import SVAE, SVAEConfig, stem_channels_for
from models.von_mises_fisher import VonMisesFisher

__all__ = [
    "PRESETS",
    "SVAE",
    "HypersphericalUniform",
    "Phases",
    "PowerSpherical",
    "SVAEConfig",
    "SamplingSettings",
    "SphereAR",
    "SphereARConfig",
    "VonMisesFisher",
    "build",
    "checkpoint_state",
    "config_from_dict",
    "config_to_dict",
    "decode",
    "encode",
    "from_checkpoint",
    "generate_tokens",
    "load_state",
    "own_names",
    "preset_of",
    "project_to_sphere",
    "stem_channels_for",
]
