"""Generation: condition -> head with guidance -> projection -> next condition, token by token. SphereAR, section 3.3.

Letters: B images · P tokens · C latent channels · D width · N rows (2B with guidance: the null-class rows behind).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from models.flow import CFG_SCHEDULES, guidance_at
from models.layers import KVCache
from models.samplers import SAMPLERS, Steps, steps_at
from models.sphere import project_to_sphere
from models.spherear import SphereAR
from models.svae import PROJECTIONS, SVAE

Noise = Callable[[int, int], Tensor]  # (token, rows) -> (num_noise, rows, C)
PIXELS_AT_ONCE = {"cuda": 2**22, "cpu": 2**19}  # through the S-VAE: 64 and 8 images of 256 x 256


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. The defaults are the published ones (for SphereAR-L cfg_scale 4.6); 1 is no guidance."""

    cfg_scale: float = 4.5
    cfg_schedule: str = "linear"
    sampler: str = "sde"
    num_sampling_steps: Steps = 100
    last_step_size: float = 0.04
    projection: str | None = None  # None: as the model was trained; to see what the projection does, another

    def __post_init__(self):
        if not 1 <= self.cfg_scale < float("inf"):
            raise ValueError(f"cfg_scale {self.cfg_scale} must be at least 1 (1 = no guidance), and finite")
        known = {"cfg_schedule": CFG_SCHEDULES, "sampler": SAMPLERS, "projection": [None, *PROJECTIONS]}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(map(str, names))}")
        if min(self._counts) < 1:
            raise ValueError(f"num_sampling_steps {self.num_sampling_steps} must be at least 1")
        if not 0 <= self.last_step_size < 1:
            raise ValueError(f"last_step_size {self.last_step_size} must lie in [0, 1)")

    @property
    def _counts(self) -> tuple[int, ...]:
        steps = self.num_sampling_steps
        return (steps,) if isinstance(steps, int) else steps

    def at(self, position: int, num_tokens: int) -> "SamplingSettings":
        """The settings of one token: with a single number of steps."""
        return replace(self, num_sampling_steps=steps_at(position, num_tokens, self.num_sampling_steps))

    @property
    def times(self) -> tuple[float, ...]:
        """The times at which the head is evaluated for a token; a token's own where steps are annealed: see `at`."""
        assert isinstance(self.num_sampling_steps, int), "annealed steps: ask at(position, num_tokens).times"
        return tuple(SAMPLERS[self.sampler].times(self.num_sampling_steps, self.last_step_size))

    @property
    def num_noise(self) -> int:
        """Noise tensors per token: the start, and what the sampler's steps add; of annealed steps, the most."""
        return SAMPLERS[self.sampler].num_noise(max(self._counts))


@dataclass(frozen=True)
class Phases:
    """The steps of a generation as functions, so that a script may hand in compiled or graphed ones."""

    new_cache: Callable[[int, torch.dtype, torch.device], KVCache]  # rows -> an empty cache
    prefill: Callable[[Tensor, KVCache], Tensor]  # labels (N,) -> condition (N, D) of token 0
    sample_token: Callable[..., Tensor]  # (condition, noise, time_embedding, scale or None, times=) -> raw (·, C)
    decode_step: Callable[[Tensor, int, KVCache], Tensor]  # tokens (N, C), position -> condition of the next token

    @classmethod
    def of(cls, model: SphereAR, settings: SamplingSettings, step: Callable | None = None) -> "Phases":
        """The model's own. `step` takes the place of the head's: an equal one, such as a compiled one."""
        sample_token = partial(model.head.sample, sampler=SAMPLERS[settings.sampler], step=step)
        return cls(model.new_cache, model.prefill, sample_token, model.decode_step)


def watch_nothing(position: int, raw: Tensor, token: Tensor) -> None:
    pass


@torch.no_grad()
def generate_tokens(
    model: SphereAR,
    labels: Tensor,
    settings: SamplingSettings,
    noise: Noise,
    phases: Phases | None = None,
    observe: Callable[[int, Tensor, Tensor], None] = watch_nothing,
    prompt: Tensor | None = None,
) -> Tensor:
    """Tokens (B, P, C) on the sphere (with the projection "all") for the class labels (B,).

    noise(token, rows): rows is B, except at an unguided token of a guided generation: there the null rows (behind)
    draw their own. observe(position, raw, token) sees every token before and after its projection. prompt (B, n, C):
    the first n tokens, which are continued as a language model continues a text.
    """
    config, batch = model.config, len(labels)
    phases = phases or Phases.of(model, settings)
    guided = settings.cfg_scale > 1
    projects = PROJECTIONS[settings.projection or config.svae.projection].tokens
    rows = torch.cat([labels, torch.full_like(labels, config.null_class)]) if guided else labels
    kind = labels.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.proj_in.weight.dtype
    kv_cache = phases.new_cache(len(rows), dtype, labels.device)
    embed_times = cache(model.head.embed_times)
    given = [] if prompt is None else prompt.unbind(dim=1)

    tokens = []
    condition = phases.prefill(rows, kv_cache)
    for position in range(config.num_tokens):
        if position < len(given):
            raw = token = given[position]
        else:
            scale = guidance_at(position, config.num_tokens, settings.cfg_scale, settings.cfg_schedule)
            here = settings.at(position, config.num_tokens)
            # As in the released code: where the scale is exactly 1 (token 0), the null rows draw a token of their own.
            draws, times = noise(position, batch if scale > 1 else len(rows))[: here.num_noise], here.times
            raw = phases.sample_token(condition, draws, embed_times(times), scale if scale > 1 else None, times=times)
            token = project_to_sphere(raw, config.radius) if projects else raw  # the paper's claim
        observe(position, raw, token)
        tokens.append(token[:batch])
        if position + 1 < config.num_tokens:
            token = torch.cat([token, token]) if len(token) < len(rows) else token
            condition = phases.decode_step(token, position, kv_cache)
    return torch.stack(tokens, dim=1)


@torch.no_grad()
def encode(model: SphereAR | SVAE, images: Tensor) -> Tensor:
    """Tokens (B, P, C), as the AR model knows them, of images (B, 3, S, S) in [-1, 1]: the posterior's mode."""
    vae = _svae_of(model)
    return torch.cat([vae.to_tokens(vae.encode(part).mode()) for part in _parts(vae, images)])


@torch.no_grad()
def decode(model: SphereAR | SVAE, tokens: Tensor) -> Iterator[Tensor]:
    """Images (b, 3, S, S), not clamped, of tokens (B, P, C), a few at a time: memory does not grow with the batch."""
    vae = _svae_of(model)
    for part in _parts(vae, tokens):
        yield vae.decode(part)


def _svae_of(model: SphereAR | SVAE) -> SVAE:
    return model if isinstance(model, SVAE) else model.vae


def _parts(vae: SVAE, values: Tensor) -> tuple[Tensor, ...]:
    return values.split(max(1, PIXELS_AT_ONCE[values.device.type] // vae.config.image_size**2))
