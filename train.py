"""Train SphereAR: first the S-VAE (--vae-only), then the autoregressive model on its frozen tokens.

One loop serves both stages. Every random number is addressed by (seed, picture, step), and data order by (seed, step):
an interrupted run continues from --results-dir as if it had never stopped.
"""

import argparse
import copy
import dataclasses
import sys
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset import build_dataset, train_loader
from models import (
    PRESETS,
    SVAE,
    SphereAR,
    SphereARConfig,
    SVAEConfig,
    config_to_dict,
    load_checkpoint,
    stem_channels_for,
)
from models.discriminator import PatchDiscriminator
from models.losses import adversarial_loss, adversarial_weight, discriminator_loss, kl_loss, reconstruction_loss
from models.lpips import LPIPS, vgg_weights
from models.sphere import GAMMA_ROUNDS
from utils import distributed
from utils.noise import Purpose, normals, uniforms
from utils.training.checkpoints import CheckpointFolder, load
from utils.training.ema import EMA
from utils.training.optim import build_adamw, learning_rate, poison, set_lr, update
from utils.training.options import check_run, check_same_run, parse_args
from utils.training.preemption import Preemption
from utils.training.tracker import Tracker

PICTURES = 16
SAMPLE_SETTINGS = dict(cfg_scale=3.0, num_sampling_steps=50)


def svae_config(args: argparse.Namespace) -> SVAEConfig:
    """The S-VAE of --model with the flags' changes."""
    config = PRESETS[args.model].svae
    changes = {
        name: getattr(args, name)
        for name in ("image_size", "patch_size", "latent_dim")
        if getattr(args, name) is not None
    }
    if changes.get("patch_size", config.patch_size) != config.patch_size:
        changes["stem_channels"] = stem_channels_for(changes["patch_size"], config.width)
    return dataclasses.replace(config, **changes)


def load_svae(path: str) -> SVAE:
    """The S-VAE in a checkpoint, ours or published, alone or inside an AR model."""
    model = load_checkpoint(path)
    return model if isinstance(model, SVAE) else model.vae


def ar_config(args: argparse.Namespace, svae: SVAEConfig) -> SphereARConfig:
    """The AR model of --model over a trained S-VAE. Raises ValueError where a flag contradicts that S-VAE."""
    for name in ("image_size", "patch_size", "latent_dim"):
        asked, trained = getattr(args, name), getattr(svae, name)
        if asked not in (None, trained):
            raise ValueError(
                f"--{name.replace('_', '-')} {asked}: the S-VAE {args.trained_vae} was trained with {trained}; "
                "leave the flag out, or give the S-VAE that fits"
            )
    names = dict(num_classes="num_classes", num_class_tokens="cls_token_num", class_dropout_prob="class_dropout",
                 diffusion_batch_mul="diff_batch_mul")  # fmt: skip
    changes = {field: getattr(args, flag) for field, flag in names.items() if getattr(args, flag) is not None}
    return dataclasses.replace(PRESETS[args.model], svae=svae, **changes)


class Autoencoder(nn.Module):
    """The S-VAE's training graph with tensors at its boundary, as DistributedDataParallel wants."""

    def __init__(self, vae: SVAE):
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, normal: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        reconstruction, posterior = self.vae(images, normal, uniform)
        return reconstruction, kl_loss(posterior)


class Adversary(nn.Module):
    """The discriminator's training graph: both its batches in one call, each normed by its own statistics."""

    def __init__(self):
        super().__init__()
        self.discriminator = PatchDiscriminator()

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return discriminator_loss(self.discriminator(images), self.discriminator(reconstruction))


class Stage:
    """What the two stages share: one process's part of a training step, in two halves around the gradients."""

    trained: nn.Module  # its parameters have the released names
    svae: SVAEConfig

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
        self.autocast = torch.autocast(device.type, dtype, enabled=args.mixed_precision != "none")
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.players: dict[str, tuple[torch.optim.AdamW, torch.amp.GradScaler, list[nn.Parameter]]] = {}

    def add_player(self, name: str, module: nn.Module) -> nn.Module:
        """Give `module` its optimizer; return it ready for its forward pass on this process."""
        args = self.args
        optimizer = build_adamw(
            module.named_parameters(), lr=args.lr, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay
        )
        scaler = torch.amp.GradScaler(self.device.type, enabled=args.mixed_precision == "fp16")
        self.players[name] = optimizer, scaler, [weight for weight in module.parameters() if weight.requires_grad]
        if distributed.world_size() == 1:
            return module
        return DistributedDataParallel(
            module,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=args.grad_accum_steps == 1,  # torch cannot hold gradients back (no_sync) in a static graph
        )

    @property
    def optimizers(self) -> list[torch.optim.AdamW]:
        return [optimizer for optimizer, _, _ in self.players.values()]

    def differentiate(self, player: str, loss: Tensor) -> None:
        _, scaler, _ = self.players[player]
        scaler.scale(poison(loss)).backward()

    def update(self) -> dict[str, Tensor]:
        """Update every player's weights where its gradient is finite; the gradients' norms, by log name."""
        return {
            f"{name}grad_norm": update(optimizer, weights, max_grad_norm=self.args.max_grad_norm, scaler=scaler)
            for name, (optimizer, scaler, weights) in self.players.items()
        }

    def images(self, batch) -> Tensor:
        """Pictures of a batch on the device, float in [-1, 1]."""
        images = batch.image.to(self.device, non_blocking=True).to(memory_format=self.memory_format)
        return images.float() / 127.5 - 1

    def posterior_draws(self, index: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The S-VAE posterior's normals (B, P, ·) and uniforms (B, P, ·) of these pictures at this step."""
        num_tokens, tangent = self.svae.num_tokens, 2 * (self.svae.latent_dim - 1)
        address = dict(seed=self.args.global_seed, index=index, step=step, device=self.device)
        normal = normals(purpose=Purpose.POSTERIOR_NORMAL, count=num_tokens * (tangent + GAMMA_ROUNDS), **address)
        uniform = uniforms(purpose=Purpose.POSTERIOR_UNIFORM, count=num_tokens * GAMMA_ROUNDS, **address)
        return normal.unflatten(-1, (num_tokens, -1)), uniform.unflatten(-1, (num_tokens, -1))

    def state(self) -> dict:
        """Weights, optimizers and scalers, under the names of the published checkpoints where those have them."""
        state = {"model": self.trained.state_dict()}
        for name, (optimizer, scaler, _) in self.players.items():
            state[f"{name}optimizer"], state[f"{name}scaler"] = optimizer.state_dict(), scaler.state_dict()
        return state

    def load_state(self, state: dict) -> None:
        self.trained.load_state_dict(state["model"])
        for name, (optimizer, scaler, _) in self.players.items():
            optimizer.load_state_dict(state[f"{name}optimizer"])
            if scaler.is_enabled():
                scaler.load_state_dict(state[f"{name}scaler"])


def reduction(wrapped: nn.Module, is_last: bool) -> AbstractContextManager:
    """Around one part of a step: gradients are summed over processes with the last part only."""
    held_back = isinstance(wrapped, DistributedDataParallel) and not is_last
    return wrapped.no_sync() if held_back else nullcontext()


def add_to(totals: dict[str, Tensor], share: float, **values: Tensor) -> None:
    for name, value in values.items():
        value = value.detach() * share
        totals[name] = totals[name] + value if name in totals else value


class SVAEStage(Stage):
    """L1 + LPIPS + hinge + KL on reconstructions, and the discriminator's own loss."""

    def __init__(self, args: argparse.Namespace, config: SVAEConfig, device: torch.device):
        super().__init__(args, device)
        self.config = self.svae = config
        vae = SVAE(config).to(device, memory_format=self.memory_format)
        vae.encoder.grad_checkpointing = vae.decoder.grad_checkpointing = args.grad_checkpointing
        self.trained = Autoencoder(vae)
        self.autoencoder = self.add_player("", self.trained)
        self.lpips = self.adversary = None
        if args.perceptual_weight > 0:
            with distributed.main_first():
                weights = vgg_weights(args.vgg_weights)
            self.lpips = LPIPS(weights).to(device, memory_format=self.memory_format)
        if args.disc_weight > 0:
            if config.image_size < 32:
                raise ValueError(
                    f"--image-size {config.image_size}: the discriminator needs 32; or set --disc-weight 0"
                )
            adversary = Adversary().to(device, memory_format=self.memory_format)
            self.discriminator = adversary.discriminator
            self.adversary = self.add_player("discriminator_", adversary)
        if args.compile:
            compile_blocks(*vae.encoder.layers, *vae.decoder.layers, vae.encoder.patchify, vae.decoder.unpatchify)

    def backward(self, batches: list, step: int) -> dict[str, Tensor]:
        share, totals = 1 / len(batches), {}
        weight = adversarial_weight(step, weight=self.args.disc_weight, start=self.args.disc_start)
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            images, index = self.images(batch), batch.index.to(self.device, non_blocking=True)
            with reduction(self.autoencoder, is_last):
                with self.autocast:
                    reconstruction, kl = self.autoencoder(images, *self.posterior_draws(index, step))
                    loss, terms = self.objective(images, reconstruction, kl, weight)
                self.differentiate("", share * loss)
            add_to(totals, share, loss=loss, **terms)
            if weight > 0:
                with reduction(self.adversary, is_last):
                    with self.autocast:
                        loss = self.adversary(images, reconstruction.detach())
                    self.differentiate("discriminator_", share * weight * loss)
                add_to(totals, share, discriminator_loss=loss)
        if self.adversary is not None and weight == 0:  # as in the recipe: until its start it only decays
            for parameter in self.discriminator.parameters():
                parameter.grad = torch.zeros_like(parameter)
        return totals

    def objective(
        self, images: Tensor, reconstruction: Tensor, kl: Tensor, weight: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The S-VAE's loss and its terms by log name; `weight` is the adversary's at this step."""
        terms = {"recon_loss": reconstruction_loss(reconstruction, images), "kl_loss": kl}
        loss = self.args.reconstruction_weight * terms["recon_loss"] + self.args.kl_weight * kl
        if self.lpips is not None:
            terms["perceptual_loss"] = self.lpips(reconstruction, images).mean()
            loss = loss + self.args.perceptual_weight * terms["perceptual_loss"]
        if weight > 0:
            self.discriminator.requires_grad_(False)  # only its input's gradient is wanted here
            terms["adversarial_loss"] = adversarial_loss(self.discriminator(reconstruction))
            self.discriminator.requires_grad_(True)
            loss = loss + weight * terms["adversarial_loss"]
        return loss, terms

    def pictures(self, averaged: Autoencoder, batch) -> Tensor:
        """Pictures of a batch (upper rows) and their reconstructions from the posterior's mean direction."""
        images = self.images(batch)[:PICTURES]
        with self.autocast:
            tokens = self.svae.radius * averaged.vae.encode(images).mu
            return torch.cat([images, averaged.vae.decode(tokens).float()])

    def state(self) -> dict:
        state = super().state()
        if self.adversary is not None:
            state["discriminator"] = self.discriminator.state_dict()
        return state

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        if self.adversary is not None:
            self.discriminator.load_state_dict(state["discriminator"])


class ARStage(Stage):
    """The flow-matching loss of next tokens, on fresh samples of the frozen S-VAE's posterior."""

    def __init__(self, args: argparse.Namespace, config: SphereARConfig, vae: SVAE, device: torch.device):
        super().__init__(args, device)
        self.config, self.svae = config, config.svae
        self.trained = SphereAR(config)
        self.trained.vae.load_state_dict(vae.state_dict())
        self.trained.vae.requires_grad_(False).eval()
        self.trained.to(device)
        self.trained.vae.to(memory_format=self.memory_format)
        self.trained.grad_checkpointing = args.grad_checkpointing
        self.wrapped = self.add_player("", self.trained)
        if args.compile:
            encoder = self.trained.vae.encoder
            compile_blocks(*self.trained.layers, self.trained.head.net, *encoder.layers, encoder.patchify)

    def backward(self, batches: list, step: int) -> dict[str, Tensor]:
        share, totals = 1 / len(batches), {}
        for i, batch in enumerate(batches):
            index, label = (value.to(self.device, non_blocking=True) for value in (batch.index, batch.label))
            with reduction(self.wrapped, is_last=i == len(batches) - 1):
                with self.autocast:
                    tokens = self.tokens(self.images(batch), index, step)
                    loss = self.wrapped(tokens, *self.draws(label, index, step))
                self.differentiate("", share * loss)
            add_to(totals, share, ar_loss=loss)
        return totals

    def load_state(self, state: dict) -> None:
        for name, value in self.trained.vae.state_dict().items():
            if not torch.equal(value.cpu(), state["model"][f"vae.{name}"]):
                raise ValueError(
                    f"--trained-vae {self.args.trained_vae}: other weights than those that the run in --results-dir "
                    f"{self.args.results_dir} is trained on; name that S-VAE, or another --results-dir"
                )
        super().load_state(state)

    @torch.no_grad()
    def tokens(self, images: Tensor, index: Tensor, step: int) -> Tensor:
        """Latent tokens (B, P, C): a sample of the frozen S-VAE's posterior."""
        posterior = self.trained.vae.encode(images)
        return self.config.radius * posterior.rsample_from(*self.posterior_draws(index, step))

    def draws(self, label: Tensor, index: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (B,) after class dropout, flow times (M, B, P) = sigmoid(normal), flow noise (M, B, P, C)."""
        config = self.config
        shape = config.diffusion_batch_mul, config.num_tokens
        address = dict(seed=self.args.global_seed, index=index, step=step, device=self.device)
        dropped = uniforms(purpose=Purpose.CLASS_DROPOUT, count=1, **address)[:, 0] < config.class_dropout_prob
        times = normals(purpose=Purpose.FLOW_TIME, count=shape[0] * shape[1], **address).unflatten(-1, shape)
        count = shape[0] * shape[1] * config.latent_dim
        noise = normals(purpose=Purpose.FLOW_NOISE, count=count, **address).unflatten(-1, (*shape, config.latent_dim))
        return label.where(~dropped, config.null_class), times.transpose(0, 1).sigmoid(), noise.transpose(0, 1)

    def pictures(self, averaged: SphereAR, batch) -> Tensor:
        """Samples of the classes 0, 1, 2, … with guidance, the same noise every time."""
        labels = torch.arange(PICTURES, device=self.device) % self.config.num_classes
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), self.autocast:
            torch.manual_seed(self.args.global_seed)
            return averaged.generate(labels, **SAMPLE_SETTINGS)


def compile_blocks(*modules: nn.Module) -> None:
    """torch.compile each module in place: far quicker than the whole, and gradients still travel block by block."""
    for module in modules:
        module.compile()


def restore(checkpoints: CheckpointFolder, stage: Stage, ema: EMA | None, args: argparse.Namespace) -> int:
    """Continue the run in --results-dir, if there is one; the number of updates it has made."""
    found = None
    if distributed.is_main():
        found = checkpoints.latest_good()
    path = distributed.gather_objects(found and found[0])[0]
    if path is None:
        return 0
    state = found[1] if found else load(path)
    for note in check_same_run(path, state, args, config_to_dict(stage.config)):
        distributed.print0(note)
    stage.load_state(state)
    if ema is not None:
        ema.load_state_dict(state["ema"])
    torch.set_rng_state(state["rng"])
    return state["step"]


@torch.no_grad()
def log_pictures(tracker: Tracker, stage: Stage, ema: EMA | None, batch, step: int) -> None:
    """Pictures by a copy of the model with the averaged weights: training's own is not disturbed, nor compiled anew."""
    averaged = copy.deepcopy(stage.trained).eval()
    if ema is not None:
        averaged.load_state_dict(ema.state_dict(), strict=False)
    tracker.picture("pictures", stage.pictures(averaged, batch), step)


def stop_if_broken(tracker: Tracker, checkpoints: CheckpointFolder, limit: int) -> bool:
    """Whether the newest update was skipped. Raises FloatingPointError after `limit` of them in a row."""
    skipped = tracker.count_skipped()
    if skipped >= limit:
        checkpoints.wait()
        last = checkpoints.good[-1] if checkpoints.good else "none"
        raise FloatingPointError(
            f"{skipped} updates in a row were not finite (--max-skipped-steps {limit}); stopped. Last checkpoint, from "
            f"before them: {last}. The same command with a lower --lr or --mixed-precision none continues from it"
        )
    return skipped > 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv, __doc__, list(PRESETS))
    device = distributed.init()
    is_cuda = device.type == "cuda"
    args.world_size = distributed.world_size()
    args.mixed_precision = args.mixed_precision or ("bf16" if is_cuda else "none")
    args.compile = is_cuda if args.compile is None else args.compile
    if is_cuda:
        torch.set_float32_matmul_precision("high")
    elif args.mixed_precision == "fp16":
        raise ValueError("--mixed-precision fp16: needs a GPU; take none or bf16")
    torch.manual_seed(args.global_seed)

    results = Path(args.results_dir)
    checkpoints = CheckpointFolder(results / "checkpoints", report=warn)
    if distributed.is_main():
        try:
            checkpoints.clean()
        except OSError as error:
            raise ValueError(f"--results-dir {results}: cannot be written ({error}); choose another folder") from None
    vae = None if args.vae_only else load_svae(args.trained_vae)
    config = svae_config(args) if vae is None else ar_config(args, vae.config)
    data = build_dataset(
        args.data_path, (config if vae is None else config.svae).image_size,
        num_classes=PRESETS[args.model].num_classes if args.num_classes is None else args.num_classes,
        seed=args.global_seed, flip=not args.no_flip,
    )  # fmt: skip
    args.num_pictures = len(data)
    steps_per_epoch = len(data) // args.global_batch_size
    total_steps = check_run(args, steps_per_epoch)
    batch_size = args.global_batch_size // (args.world_size * args.grad_accum_steps)
    stage = SVAEStage(args, config, device) if vae is None else ARStage(args, config, vae, device)
    ema = EMA(stage.trained.named_parameters(), args.ema) if args.ema > 0 else None
    step = restore(checkpoints, stage, ema, args)

    def state() -> dict:
        """Everything of the run after `step` updates, under the published names where there are any."""
        parts = stage.state()
        averages = {} if ema is None else {"ema": parts["model"] | ema.state_dict()}
        return {
            **parts, **averages, "config": config_to_dict(config), "args": args, "rng": torch.get_rng_state(),
            "step": step, "epochs": step // steps_per_epoch, "step_in_epoch": step % steps_per_epoch,
            "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)},
        }  # fmt: skip

    loader = train_loader(
        data, global_batch_size=args.global_batch_size, batch_size=batch_size, seed=args.global_seed, start_step=step,
        num_steps=total_steps, rank=distributed.rank(), world_size=args.world_size, num_workers=args.num_workers,
        aug_decay_start=args.aug_decay_start_epoch, aug_decay_end=args.aug_decay_end_epoch,
        max_bad_share=args.max_bad_share, pin_memory=is_cuda, report=warn,
    )  # fmt: skip
    tracker = Tracker(
        results, step=step, total_steps=total_steps, steps_per_epoch=steps_per_epoch,
        global_batch_size=args.global_batch_size,
    )  # fmt: skip
    trainable = sum(weight.numel() for weight in stage.trained.parameters() if weight.requires_grad)
    tracker.print(
        f"{args.model} {'S-VAE' if vae is None else 'AR'}, {trainable:,} trainable parameters, precision "
        f"{args.mixed_precision}; {len(data):,} pictures, {steps_per_epoch} steps per epoch; {step} of {total_steps} "
        f"steps done; batch {args.global_batch_size} = {args.world_size} processes ({device.type}) x "
        f"{args.grad_accum_steps} parts x {batch_size}"
    )
    schedule = partial(
        learning_rate, lr=args.lr, min_lr=args.min_lr, warmup_steps=args.warmup_steps, decay_start=args.decay_start,
        total_steps=total_steps,
    )  # fmt: skip
    with (
        Preemption(rescue=lambda: checkpoints.save(state(), step) or checkpoints.wait()) as preemption,
        tracker, checkpoints, closing(iter(loader)) as parts,
    ):  # fmt: skip
        stopped = False
        while step < total_steps and not stopped:
            batches = [next(parts) for _ in range(loader.batches_per_step)]
            lr = schedule(step)
            set_lr(stage.optimizers, lr)
            losses = stage.backward(batches, step)
            with preemption.updating:  # a checkpoint is taken before or after, never within
                norms = stage.update()
                if ema is not None:
                    ema.update()
                step += 1
            finite = torch.stack(list(norms.values())).isfinite().all()
            tracker.add(step, losses | norms, finite=finite, indices=torch.cat([batch.index for batch in batches]))

            stopped = preemption.requested()
            is_last, ends_epoch = step == total_steps, step % steps_per_epoch == 0
            if step % args.log_every == 0 or is_last or stopped:
                stop_if_broken(tracker, checkpoints, args.max_skipped_steps)
                tracker.log(step, lr)
            if args.sample_every and step % args.sample_every == 0 and distributed.is_main():
                log_pictures(tracker, stage, ema, batches[0], step)
            if step % args.save_every == 0 or ends_epoch or is_last or stopped:
                skipping = stop_if_broken(tracker, checkpoints, args.max_skipped_steps)
                kept = ends_epoch and step // steps_per_epoch % args.keep_freq == 0
                if distributed.is_main() and (is_last or stopped or kept or not skipping):
                    checkpoints.save(state(), step, step // steps_per_epoch if kept else None)

        saved = checkpoints.wait()
        if stopped:
            newest = f"step {step}" if saved else f"{checkpoints.good[-1].name if checkpoints.good else 'the start'}"
            tracker.print(f"stopped by a signal after step {step}; the same command continues from {newest}")
    distributed.barrier()
    distributed.cleanup()
    return preemption.exit_code if stopped else 0 if saved else 1


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"train.py: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"train.py: {error}\nRaise --grad-accum-steps (same update, less memory), or add --grad-checkpointing")
