"""SphereAR's models: the sphere, the S-VAE, the AR transformer and its diffusion head."""

from models.pretrained import (
    build,
    checkpoint_state,
    config_from_dict,
    config_to_dict,
    load_checkpoint,
    load_state,
    read_checkpoint,
)
from models.sphere import HypersphericalUniform, PowerSpherical, project_to_sphere
from models.spherear import PRESETS, SphereAR, SphereARConfig
from models.svae import SVAE, SVAEConfig, stem_channels_for
from models.von_mises_fisher import VonMisesFisher

__all__ = [
    "PRESETS",
    "SVAE",
    "HypersphericalUniform",
    "PowerSpherical",
    "SVAEConfig",
    "SphereAR",
    "SphereARConfig",
    "VonMisesFisher",
    "build",
    "checkpoint_state",
    "config_from_dict",
    "config_to_dict",
    "load_checkpoint",
    "load_state",
    "project_to_sphere",
    "read_checkpoint",
    "stem_channels_for",
]
