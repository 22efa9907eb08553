"""Train SphereAR: first the S-VAE (--vae-only), then the autoregressive model on its frozen tokens.

One loop serves both stages. Every random number is addressed by (seed, image, step), and data order by (seed, step):
an interrupted run continues from --results-dir as if it had never stopped.
"""

import sys

if __name__ == "__main__":
    from utils.early import end_when_told

    end_when_told()

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from dataset import ImageDataset, Sample, build_dataset, train_loader
from dataset.held_out import HeldOut, held_out_indices
from dataset.toy import Judge, fit_judge
from models import PRESETS, SVAE, SphereAR, SphereARConfig, SVAEConfig
from models.checkpoint import checkpoint_state, config_from_dict, config_to_dict, from_checkpoint, load_state, own_names
from models.discriminator import Adversary, PatchDiscriminator
from models.generation import SamplingSettings, decode, generate_tokens
from models.losses import adversarial_loss, adversarial_weight, reconstruction_loss
from models.lpips import LPIPS, vgg_weights
from models.posteriors import POSTERIORS, Draws
from models.svae import PROJECTIONS
from utils import checkpoint_file, distributed, script
from utils.evaluation.online import Comparison, compare_reconstructions, compare_samples
from utils.images import to_float, to_uint8
from utils.provenance import provenance, versions
from utils.sampling.draws import image_noise, make_labels
from utils.training import evaluation, report_page
from utils.training.checkpoints import CheckpointFolder, Entry, read_back
from utils.training.compilation import compile_ar, compile_svae
from utils.training.draws import StepDraws
from utils.training.ema import EMA
from utils.training.latents import measure_scale
from utils.training.optim import learning_rate, load_optimizer, set_lr
from utils.training.options import ar_config, check_run, check_same_run, parse_args, svae_config
from utils.training.players import Player, make_player
from utils.training.preemption import Preemption
from utils.training.report import stop, stop_if_broken
from utils.training.tracker import Progress, Tracker, add_to

NUM_PREVIEWS = 16
NUM_MEASURED, MEASURED_AT_ONCE = 8192, 64  # images for the scale of flat latents, over all processes
PREVIEW_SETTINGS = SamplingSettings(cfg_scale=3.0, num_sampling_steps=50)


def load_svae(path: str) -> SVAE:
    """The S-VAE in a checkpoint, ours or published, alone or inside an AR model; every byte of it is verified."""
    try:
        file = distributed.from_main(lambda: checkpoint_file.examine(path))
        with distributed.all_or_none():
            model = checkpoint_file.load_examined(file, from_checkpoint)
    except ValueError as error:
        error.args = (f"--trained-vae {error}; train one with --vae-only, or name its file",)
        raise
    return model if isinstance(model, SVAE) else model.vae


# ---- the two stages: build, and one step -----------------------------------------------------------------------------


class Stage:
    """What the two stages share: one process's part of a training step, in two halves around the gradients."""

    model: SVAE | SphereAR

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.autocast = script.autocast(device, args.mixed_precision)
        self.memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.players: list[Player] = []

    def add_player(self, name: str, module: nn.Module) -> Player:
        args = self.args
        player = make_player(
            name, module, self.device, lr=args.lr, betas=(args.beta1, args.beta2), weight_decay=args.weight_decay,
            is_fp16=args.mixed_precision == "fp16", num_parts=args.grad_accum_steps,
        )  # fmt: skip
        self.players.append(player)
        return player

    def update(self) -> dict[str, Tensor]:
        """Update every player's weights where its gradient is finite; the gradients' norms, by log name."""
        return {f"{player.prefix}grad_norm": player.update(self.args.max_grad_norm) for player in self.players}

    def has_finite_weights(self) -> bool:
        """Whether all weights of all players are finite numbers. Waits for the device."""
        return all(player.has_finite_weights() for player in self.players)

    def images(self, batch: Sample) -> Tensor:
        """Images of a batch on the device, float in [-1, 1]."""
        return to_float(batch.image.to(self.device, non_blocking=True).to(memory_format=self.memory_format))

    def draws(self, batch: Sample, step: int) -> StepDraws:
        index = batch.index.to(self.device, non_blocking=True)
        return StepDraws(self.args.global_seed, step, index, compiled=self.args.compile)

    def check_continues(self, state: dict) -> None:
        """Raises ValueError where the checkpoint `state` cannot be continued in this stage."""

    def finish(self, averaged: Callable, data: ImageDataset, step: int, report: Callable[[str], None]) -> None:
        """What is left to do after the last update and before it is saved; `with averaged()` gives the model for it."""


def posterior_draws(svae: SVAE, draws: StepDraws) -> Draws:
    config = svae.config
    return Draws(*draws.posterior(config.num_tokens, *POSTERIORS[config.posterior].num_draws(config.latent_dim)))


class SVAEStage(Stage):
    """L1 + LPIPS + hinge + KL on reconstructions, and the discriminator's own loss."""

    model: SVAE

    def __init__(self, args: argparse.Namespace, config: SVAEConfig, device: torch.device):
        super().__init__(args, device)
        for weight, least, what in (("disc", 32, "the discriminator"), ("perceptual", 16, "LPIPS")):
            if getattr(args, f"{weight}_weight") > 0 and config.image_size < least:
                raise ValueError(f"--image-size {config.image_size}: {what} needs {least}; or set --{weight}-weight 0")
        vae = self.model = SVAE(config).to(device, memory_format=self.memory_format)
        vae.encoder.grad_checkpointing = vae.decoder.grad_checkpointing = args.grad_checkpointing
        self.autoencoder = self.add_player("model", vae)
        self.lpips = self.discriminator = None
        if args.perceptual_weight > 0:
            distributed.from_main(lambda: vgg_weights(args.vgg_weights) and None)  # downloads them once
            with distributed.all_or_none():
                self.lpips = LPIPS(vgg_weights(args.vgg_weights)).to(device, memory_format=self.memory_format)
        if args.disc_weight > 0:
            self.discriminator = PatchDiscriminator().to(device, memory_format=self.memory_format)
            self.adversary = self.add_player("discriminator", Adversary(self.discriminator))
        if args.compile:
            compile_svae(vae, *filter(None, (self.lpips, self.discriminator)))

    def backward(self, batches: list[Sample], step: int) -> dict[str, Tensor]:
        share, totals, weight = 1 / len(batches), {}, 0.0
        if self.discriminator is not None:
            weight = adversarial_weight(step, weight=self.args.disc_weight, start=self.args.disc_start)
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            images = self.images(batch)
            with self.autoencoder.reduces(is_last):
                with self.autocast:
                    reconstruction, kl = self.autoencoder(images, posterior_draws(self.model, self.draws(batch, step)))
                    loss, terms = self.objective(images, reconstruction, kl, weight)
                self.autoencoder.backward(share * loss)
            add_to(totals, share, loss=loss, **terms)
            if weight > 0:
                with self.adversary.reduces(is_last):
                    with self.autocast:
                        loss = self.adversary(images, reconstruction.detach())
                    self.adversary.backward(share * weight * loss)
                add_to(totals, share, discriminator_loss=loss)
        if self.discriminator is not None and weight == 0:  # as in the recipe: until its start it only decays
            self.adversary.backward_of_nothing()
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

    def preview(self, averaged: SVAE, batch: Sample) -> Tensor:
        """Images of a batch (upper rows) and their reconstructions; each process makes its share."""
        images = self.images(batch)[: -(-NUM_PREVIEWS // distributed.world_size())]
        pair = distributed.gather(torch.stack([images, self.reconstruct(averaged, images)]))  # (processes, 2, b, ...)
        return pair.transpose(0, 1).flatten(1, 2)[:, :NUM_PREVIEWS].flatten(0, 1)

    def reconstruct(self, model: SVAE, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) from the posterior's mode."""
        with self.autocast:
            return model.decode(model.to_tokens(model.encode(images).mode())).float()

    def held_out_losses(self, model: SVAE, batch: Sample) -> dict[str, Tensor]:
        """By log name, without the adversary's, which changes."""
        images, draws = self.images(batch), evaluation.draws(batch.index.to(self.device))
        with self.autocast:
            loss, terms = self.objective(images, *model(images, posterior_draws(model, draws)), weight=0.0)
        return {"loss": loss, **terms}

    def quality(self, model: SVAE, comparison: Comparison) -> dict[str, float]:
        """rFID, PSNR and SSIM of reconstructions."""
        return comparison.reconstructed(partial(self.reconstruct, model))

    def finish(self, averaged: Callable, data: ImageDataset, step: int, report: Callable[[str], None]) -> None:
        """Measure the shift and scale of flat latents, which the AR model will need."""
        config = self.model.config
        if not config.is_flat:
            return
        mine = Subset(data, range(min(len(data), NUM_MEASURED))[distributed.rank() :: distributed.world_size()])
        batches = DataLoader(mine, MEASURED_AT_ONCE, generator=torch.Generator())  # else it draws from torch's own
        with averaged() as model, self.autocast:
            found = measure_scale(
                model.encode(self.images(batch)).sample_from(posterior_draws(model, self.draws(batch, step)))
                for batch in batches
            )
        self.model.config = dataclasses.replace(config, latent_shift=found.shift, latent_scale=found.scale)
        report(str(found))


class ARStage(Stage):
    """The flow-matching loss of next tokens, on fresh samples of the frozen S-VAE's posterior."""

    model: SphereAR

    def __init__(
        self, args: argparse.Namespace, config: SphereARConfig, vae: SVAE, judge: Judge | None, device: torch.device
    ):
        super().__init__(args, device)
        self.judge = judge
        model = self.model = SphereAR(config)
        model.vae.load_state_dict(vae.state_dict())
        model.vae.requires_grad_(False).eval()
        model.to(device)
        model.vae.to(memory_format=self.memory_format)
        model.grad_checkpointing = args.grad_checkpointing
        self.player = self.add_player("model", model)
        if args.compile:
            compile_ar(model)

    def backward(self, batches: list[Sample], step: int) -> dict[str, Tensor]:
        share, totals = 1 / len(batches), {}
        for i, batch in enumerate(batches):
            with self.player.reduces(is_last=i == len(batches) - 1):
                draws, dropout = self.draws(batch, step), self.model.config.class_dropout_prob
                loss = self.loss(self.player, self.model.vae, batch, draws, dropout)
                self.player.backward(share * loss)
            add_to(totals, share, ar_loss=loss)
        return totals

    def loss(self, model: Callable, vae: SVAE, batch: Sample, draws: StepDraws, class_dropout: float) -> Tensor:
        """The AR loss of a model, or of what trains it, on a batch of images that are tokens by `vae`."""
        config, label = self.model.config, batch.label.to(self.device, non_blocking=True)
        label = label.where(~draws.is_dropped(class_dropout), config.null_class)
        t = draws.flow_times(config.diffusion_batch_mul, config.num_tokens)
        noise = draws.flow_noise(config.diffusion_batch_mul, config.num_tokens, config.latent_dim)
        with self.autocast:
            return model(self.tokens(vae, self.images(batch), draws), label, t, noise)

    def held_out_losses(self, model: SphereAR, batch: Sample) -> dict[str, Tensor]:
        """By log name; with every label."""
        return {"ar_loss": self.loss(model, model.vae, batch, evaluation.draws(batch.index.to(self.device)), 0.0)}

    @torch.no_grad()
    def tokens(self, vae: SVAE, images: Tensor, draws: StepDraws) -> Tensor:
        """Latent tokens (B, P, C): a sample of the frozen S-VAE's posterior."""
        return vae.to_tokens(vae.encode(images).sample_from(posterior_draws(vae, draws)))

    def check_continues(self, state: dict) -> None:
        for name, value in self.model.vae.state_dict().items():
            theirs = state["model"].get(f"vae.{name}")
            if not isinstance(theirs, Tensor) or not torch.equal(value.cpu(), theirs):
                raise ValueError(
                    f"--trained-vae {self.args.trained_vae}: other weights than those that the run in --results-dir "
                    f"{self.args.results_dir} is trained on; name that S-VAE, or another --results-dir"
                )

    def preview(self, averaged: SphereAR, batch: Sample) -> Tensor:
        """Samples of the classes 0, 1, 2, … with guidance; each process makes its share."""
        share = -(-NUM_PREVIEWS // distributed.world_size())
        images = torch.arange(share, device=self.device) + share * distributed.rank()
        mine = self.samples(averaged, images, images % averaged.config.num_classes, PREVIEW_SETTINGS)
        return distributed.gather(mine).flatten(0, 1)[:NUM_PREVIEWS]

    def samples(self, model: SphereAR, images: Tensor, labels: Tensor, settings: SamplingSettings) -> Tensor:
        """Images (B, 3, S, S) of these numbers and labels, the same noise every time."""
        noise = image_noise(self.args.global_seed, images, settings.num_noise, model.config.latent_dim)
        with self.autocast:
            return torch.cat(list(decode(model, generate_tokens(model, labels, settings, noise)))).float()

    def quality(self, model: SphereAR, comparison: Comparison) -> dict[str, float]:
        """FID, MIND, class agreement of what sample_ddp.py makes of this model with --labels balanced."""
        seed, count, num_classes = self.args.global_seed, self.args.eval_samples, model.config.num_classes
        labels = torch.from_numpy(make_labels("balanced", count, num_classes, seed)).to(self.device)
        settings = dataclasses.replace(PREVIEW_SETTINGS, cfg_scale=self.args.eval_cfg_scale)
        comparison.receipt["samples"] = {"images": count, "seed": seed, **dataclasses.asdict(settings)}
        agreeing = torch.zeros(1, dtype=torch.float64, device=self.device)

        def make(images: Tensor) -> Tensor:
            made = self.samples(model, images, labels[images], settings)
            if self.judge is not None:
                agreeing.add_(len(made) * self.judge.agreement(to_uint8(made), labels[images].cpu().numpy()))
            return made

        found = comparison.generated(make, count)
        if self.judge is not None:
            found["class_agreement"] = distributed.reduce_sum(agreeing).item() / count
        return found


# ---- what a checkpoint holds -----------------------------------------------------------------------------------------


def checkpoint_entries(stage: Stage, ema: EMA | None, progress: Progress, args: argparse.Namespace) -> dict[str, Entry]:
    """All that a checkpoint holds, under the published names where there are any."""
    model = stage.model
    entries = {
        "model": Entry(lambda: checkpoint_state(model), partial(load_state, model)),
        # nothing here draws from torch's own generator: it is kept for whoever adds something that does
        "rng": Entry(torch.get_rng_state, torch.set_rng_state),
        "step": Entry(lambda: progress.step, partial(setattr, progress, "step")),
        # compared with this run's by check_same_run
        "args": Entry(lambda: args),
        "config": Entry(lambda: config_to_dict(model.config)),
        # for people
        "epochs": Entry(lambda: progress.epoch),
        "step_in_epoch": Entry(lambda: progress.step_in_epoch),
        "versions": Entry(versions),
    }
    for player in stage.players:
        optimizer = player.optimizer
        entries[f"{player.prefix}optimizer"] = Entry(optimizer.state_dict, partial(load_optimizer, optimizer))
        entries[f"{player.prefix}scaler"] = Entry(player.scaler.state_dict, player.load_scaler)
    if ema is not None:
        entries["ema"] = Entry(
            lambda: checkpoint_state(model, ema.state_dict()),
            lambda state: ema.load_state_dict(own_names(model, state)),
        )
    discriminator = getattr(stage, "discriminator", None)
    if discriminator is not None:
        entries["discriminator"] = Entry(discriminator.state_dict, discriminator.load_state_dict)
    return entries


def restore(checkpoints: CheckpointFolder, stage: Stage, entries: dict[str, Entry], args: argparse.Namespace) -> None:
    """Continue the run in --results-dir, if there is one."""
    path = distributed.from_main(checkpoints.newest_good)
    if path is None:
        return
    with distributed.all_or_none():
        state, config_before = checkpoint_file.load(path, lambda state: (state, config_from_dict(state["config"])))
        # with fields that it did not have then
        configs = config_to_dict(config_before), config_to_dict(stage.model.config)
        notes = check_same_run(path, state["args"], args, *configs)
        stage.check_continues(state)
        read_back(entries, state, path)
    distributed.from_main(lambda: checkpoints.continue_from(path))
    for note in notes:
        distributed.print0(note)


# ---- the run ---------------------------------------------------------------------------------------------------------


@contextmanager
def averaged(stage: Stage, ema: EMA | None) -> Iterator[nn.Module]:
    """A copy of the model with the averaged weights: training's own is not disturbed, nor compiled anew."""
    model = copy.deepcopy(stage.model).eval()
    if ema is not None:
        model.load_state_dict(ema.state_dict(), strict=False)
    with torch.no_grad():
        yield model


def build(args: argparse.Namespace, device: torch.device) -> tuple[Stage, ImageDataset, HeldOut, Comparison | None]:
    """What the flags ask for: the stage, its data, those left out, and what its images are compared with.

    An error of one process is raised on all.
    """
    vae = None if args.vae_only else load_svae(args.trained_vae)
    with distributed.all_or_none():
        preset = PRESETS[args.model]
        config = svae_config(args, preset.svae) if vae is None else ar_config(args, preset, vae.config)
        data = build_dataset(
            args.data_path, (config if vae is None else config.svae).image_size,
            num_classes=preset.num_classes if args.num_classes is None else args.num_classes,
            seed=args.global_seed, flip=not args.no_flip,
        )  # fmt: skip
    left_out = HeldOut(data, held_out_indices(len(data), args.held_out))
    comparison = None
    if args.eval_every and args.vae_only:
        comparison = compare_reconstructions(args.eval_reference, left_out, args.eval_samples, data.image_size, device)
    elif args.eval_reference is not None:
        comparison = compare_samples(args.eval_reference, device, cache_features=bool(args.cache_features))
    with distributed.all_or_none():
        judge = None if args.eval_judge is None else fit_judge(args.eval_judge, data.image_size)
    stage = SVAEStage(args, config, device) if vae is None else ARStage(args, config, vae, judge, device)
    return stage, data, left_out, comparison


def train(args: argparse.Namespace, stack: ExitStack) -> int:
    """Train as the flags say, and close the stack; the exit code."""
    device = distributed.init()
    is_cuda = device.type == "cuda"
    args.world_size = distributed.world_size()
    args.mixed_precision = script.choose_precision(args.mixed_precision, device)
    args.compile = is_cuda if args.compile is None else args.compile
    script.allow_tf32(products=is_cuda, convolutions=is_cuda)
    torch.manual_seed(args.global_seed)

    checkpoints = CheckpointFolder(Path(args.results_dir, "checkpoints"), report=script.warn)
    distributed.from_main(lambda: checkpoints.open(stack))
    stage, data, left_out, comparison = build(args, device)
    args.num_pictures = len(data)  # the name that it has in checkpoints
    steps_per_epoch = (len(data) - args.held_out) // args.global_batch_size
    progress = Progress(check_run(args, steps_per_epoch), steps_per_epoch)
    ema = EMA(stage.model.named_parameters(), args.ema) if args.ema > 0 else None
    entries = checkpoint_entries(stage, ema, progress, args)
    restore(checkpoints, stage, entries, args)

    batch_size = args.global_batch_size // (args.world_size * args.grad_accum_steps)
    loader = train_loader(
        data, global_batch_size=args.global_batch_size, batch_size=batch_size, seed=args.global_seed,
        start_step=progress.step, num_steps=progress.total_steps, rank=distributed.rank(), world_size=args.world_size,
        held_out=left_out.indices, num_workers=args.num_workers, aug_decay_start=args.aug_decay_start_epoch,
        aug_decay_end=args.aug_decay_end_epoch, pin_memory=is_cuda, max_bad_share=args.max_bad_share,
        report=script.warn,
    )  # fmt: skip
    schedule = partial(
        learning_rate, lr=args.lr, min_lr=args.min_lr, warmup_steps=args.warmup_steps, decay_start=args.decay_start,
        total_steps=progress.total_steps,
    )  # fmt: skip

    def save(kept_epoch: int | None = None) -> None:
        checkpoints.save({name: entry.write() for name, entry in entries.items()}, progress.step, kept_epoch)

    def rescue() -> None:
        if stage.has_finite_weights():
            save()
            checkpoints.wait()

    preemption = stack.enter_context(Preemption(rescue))
    tracker = stack.enter_context(Tracker(Path(args.results_dir), progress, args.global_batch_size, report=script.warn))
    stack.enter_context(checkpoints)
    parts = stack.enter_context(closing(iter(loader)))
    with_average = partial(averaged, stage, ema)
    evaluates = evaluation.Evaluation(stage, left_out, comparison, tracker, with_average, args.eval_every)
    trainable = sum(weight.numel() for weight in stage.players[0].weights)
    tracker.print(
        f"{args.model} {'S-VAE' if args.vae_only else 'AR'}, {trainable:,} trainable parameters, precision "
        f"{args.mixed_precision}; {len(data) - args.held_out:,} images, {steps_per_epoch} steps per epoch; "
        f"{progress.step} of {progress.total_steps} steps done; batch {args.global_batch_size} = {args.world_size} "
        f"processes ({device.type}) x {args.grad_accum_steps} parts x {batch_size}"
    )
    tracker.record("run", {"settings": vars(args), "trainable_parameters": trainable, **provenance(device)})
    if progress.is_done:
        tracker.print("nothing is left to do; more --epochs or --max-steps would continue")
    if evaluates.is_due():  # a signal came before
        evaluates.run()
    stopped = False
    while not progress.is_done and not stopped:
        batches = [next(parts) for _ in range(loader.batches_per_step)]
        lr = schedule(progress.step)
        set_lr((player.optimizer for player in stage.players), lr)
        losses = stage.backward(batches, progress.step)
        with preemption.updating:  # a checkpoint is taken before or after, never within
            norms = stage.update()
            if ema is not None:
                ema.update()
            progress.step += 1
        finite = torch.stack(list(norms.values())).isfinite().all()
        tracker.add(losses | norms, finite=finite, indices=torch.cat([batch.index for batch in batches]))

        stopped = preemption.requested()
        step, ends_epoch, is_end = progress.step, progress.step_in_epoch == 0, progress.is_done or stopped
        if step % args.log_every == 0 or is_end:
            stop_if_broken(tracker, checkpoints, args.max_skipped_steps, args.mixed_precision)
            tracker.log(lr)
        if args.sample_every and step % args.sample_every == 0:
            with tracker.pause(), with_average() as model:
                tracker.image("images", stage.preview(model, batches[0]))
        if progress.is_done:
            stage.finish(with_average, data, step, tracker.print)
        if step % args.save_every == 0 or ends_epoch or is_end:
            skipping = stop_if_broken(tracker, checkpoints, args.max_skipped_steps, args.mixed_precision)
            if not stage.has_finite_weights():
                what = f"weights are not finite after step {step}, though their gradients were"
                stop(checkpoints, what, args.mixed_precision)
            kept = ends_epoch and bool(args.keep_freq) and progress.epoch % args.keep_freq == 0
            if distributed.is_main() and (is_end or kept or not skipping):
                save(progress.epoch if kept else None)
        if not stopped and evaluates.is_due():
            evaluates.run()

    saved = checkpoints.wait()
    if stopped:
        newest = f"step {progress.step}" if saved else checkpoints.good[-1].name if checkpoints.good else "the start"
        tracker.print(f"stopped by a signal after step {progress.step}; the same command continues from {newest}")
    stack.close()
    if not stopped and distributed.is_main():
        report_page.write_or_say_why_not(Path(args.results_dir), script.warn)
    distributed.barrier()
    return preemption.exit_code if stopped else script.DONE if saved else script.FAILED


def parse(argv: list[str] | None) -> argparse.Namespace:
    return parse_args(argv, __doc__, list(PRESETS), list(POSTERIORS), list(PROJECTIONS))


def main(argv: list[str] | None = None) -> int:
    def body(args: argparse.Namespace) -> int:
        with ExitStack() as stack:
            return train(args, stack)

    return script.run(
        "train.py", parse, body, argv,
        when_stopped="the same command continues from the last checkpoint, if there is one",
        out_of_memory="Raise --grad-accum-steps (same update, less memory), add --grad-checkpointing, or take less.",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
