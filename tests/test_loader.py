"""Training batches: independent of workers, processes and the resume point; bad images, signals."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import build_dataset, crop_probability, train_loader
from tests.helpers.dataset_tars import bad_images, class_tars, damaged_tar, small_classes

SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    return build_dataset(class_tars(tmp_path / "train.tar", small_classes()), SIZE, num_classes=3, seed=5)


@pytest.fixture
def damaged(tmp_path):
    return damaged_tar(tmp_path / "damaged.tar")


def load(data, *, seed=5, start_step=0, num_steps=7, global_batch_size=8, batch_size=8, **options):
    options = {"aug_decay_start": 1, "aug_decay_end": 2, **options}
    return list(
        train_loader(
            data,
            seed=seed,
            start_step=start_step,
            num_steps=num_steps,
            global_batch_size=global_batch_size,
            batch_size=batch_size,
            **options,
        )
    )


def rows(batches):
    """All images of some batches as (index, label, bytes)."""
    return [(int(i), int(l), x.numpy().tobytes()) for b in batches for x, l, i in zip(b.image, b.label, b.index)]


def test_batches_are_uint8_and_contiguous(data):
    for workers in (0, 1):
        batch = load(data, num_steps=1, num_workers=workers)[0]
        assert batch.image.dtype == torch.uint8 and batch.image.shape == (8, 3, SIZE, SIZE)
        assert batch.image.is_contiguous() and batch.label.dtype == torch.int64 and list(batch.bad) == [""] * 8
        assert [data.label(int(i)) for i in batch.index] == batch.label.tolist()


def test_the_same_images_for_any_number_of_workers(data):
    expected = rows(load(data))
    for workers in (1, 2):
        assert rows(load(data, num_workers=workers)) == expected


def test_global_batches_are_the_same_for_any_world_size_and_accumulation(data):
    expected = rows(load(data))
    for world, batch_size in ((1, 2), (2, 4), (2, 1), (4, 2)):
        per_rank = [
            rows(load(data, rank=rank, world_size=world, batch_size=batch_size, num_workers=rank == 1))
            for rank in range(world)
        ]
        share = 8 // world
        found = [row for step in range(7) for part in per_rank for row in part[step * share : (step + 1) * share]]
        assert found == expected


def test_resuming_at_any_step_gives_the_rest(data):
    expected = rows(load(data))  # 3 steps per epoch: 7 steps reach into the third epoch
    for start in range(8):
        assert rows(load(data, start_step=start, num_workers=start == 4)) == expected[8 * start :]
    micro = rows(load(data, start_step=4, batch_size=2))
    assert micro == expected[32:]


def test_an_epoch_shows_every_image_once_and_the_incomplete_step_is_left_out(data):
    loader = train_loader(data, seed=1, num_steps=6, global_batch_size=8, batch_size=4)
    assert (loader.steps_per_epoch, loader.batches_per_step) == (3, 2)
    order = [index for index, _, _ in rows(loader)]
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24)) and order[:24] != order[24:]
    loader = train_loader(data, seed=1, num_steps=2, global_batch_size=10, batch_size=10)
    assert loader.steps_per_epoch == 2 and len(set(row[0] for row in rows(loader))) == 20


def test_iterating_leaves_the_trainers_random_numbers_alone(data):
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    load(data, num_workers=1)
    load(data)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_the_augmentation_schedule():
    schedule = [crop_probability(epoch, 350, 375) for epoch in (0, 349, 350, 355, 374, 375, 399)]
    assert schedule == [1, 1, 1, 0.8, 1 / 25, 0, 0]
    assert crop_probability(0, 0, 0) == 0 and crop_probability(4, 5, 5) == 1 and crop_probability(5, 5, 5) == 0


def test_fast_and_exact_images_are_close(data):
    fast = rows(load(data))
    data.fast = False
    exact = rows(load(data))
    a, b = (np.array([list(row[2]) for row in side]) for side in (fast, exact))
    assert [row[:2] for row in fast] == [row[:2] for row in exact]
    assert 0 < (a != b).mean() < 0.02 and np.abs(a - b).max() <= 2


def test_bad_images_are_replaced_alike_everywhere_counted_and_named(damaged):
    data = build_dataset(damaged, SIZE, num_classes=2, seed=0)
    told = []
    expected = None
    for workers, fast in ((0, True), (2, True), (0, False)):
        data.fast = fast
        told.clear()
        loader = train_loader(
            data,
            seed=0,
            num_steps=16,
            global_batch_size=8,
            batch_size=8,
            num_workers=workers,
            max_bad_share=0.2,
            report=told.append,
        )
        batches = list(loader)
        assert loader.num_replaced == 16 and len(told) == 8  # two epochs, each name once
        for kind, (_, says) in bad_images().items():
            assert any(f"n00000000/{kind}.JPEG" in text and says in text for text in told)
        for text in told:
            assert text.startswith("bad image replaced (")
        if fast:
            expected = expected or rows(batches)
            assert rows(batches) == expected
    replaced = [b for batch in batches for b in zip(batch.bad, batch.index.tolist(), batch.label.tolist()) if b[0]]
    assert len({index for _, index, _ in replaced}) == 8
    assert {label for _, _, label in replaced} == {0, 1}  # the label is the replacement's


def test_too_many_bad_images_are_an_error(damaged, tmp_path):
    data = build_dataset(damaged, SIZE, num_classes=2, seed=0)
    with pytest.raises(ValueError, match=r"2 bad images in one epoch, more than --max-bad-share 0\.001"):
        load(data, num_steps=9, global_batch_size=7, batch_size=7)
    classes = small_classes()
    classes["n00000000"]["bad.JPEG"] = b""
    data = build_dataset(class_tars(tmp_path / "one.tar", classes), SIZE, num_classes=3, seed=0)
    assert len(load(data, num_steps=30, global_batch_size=5, batch_size=5)) == 30  # a single one never is
    hopeless = class_tars(tmp_path / "hopeless.tar", {"n0": {f"{i}.JPEG": b"" for i in range(4)}})
    data, reads = build_dataset(hopeless, SIZE, num_classes=1, seed=0), []
    with pytest.raises(ValueError, match=r"16 bad images in a row, the first n0/\d.JPEG: empty"):
        load(data, global_batch_size=2, batch_size=2)
    data.source.read = lambda index: reads.append(index) or b""
    with pytest.raises(ValueError, match="16 bad images in a row"):
        data[0]
    assert len(reads) == 16 and set(reads) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"start_step": 8}, "start step 8 is not within 0 .. 7 steps; raise --epochs or --max-steps"),
        ({"aug_decay_start": 5, "aug_decay_end": 4}, "--aug-decay-end-epoch 4 lies before --aug-decay-start-epoch 5"),
    ],
)
def test_numbers_that_do_not_fit_are_named(data, options, says):
    with pytest.raises(ValueError) as error:
        load(data, **options)
    assert says in str(error.value)


def workers_at_work(data):
    """An iterator over many batches that has begun, and its two worker processes."""
    batches = iter(train_loader(data, seed=0, num_steps=60, global_batch_size=8, batch_size=2, num_workers=2))
    next(batches), next(batches)  # one of each worker: both have begun
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    return batches, workers


def test_workers_survive_the_signals_of_a_stopping_job(data):
    batches, workers = workers_at_work(data)
    for name in ("INT", "TERM", "USR1"):  # from outside, as Ctrl-C, SLURM and torchrun send them
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(batches)) == 238
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def test_workers_obey_their_parent(data):
    batches, workers = workers_at_work(data)
    for worker in workers:
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    batches.close()


def test_a_killed_worker_is_one_line_where_the_next_batch_is_waited_for(data):
    handler = signal.getsignal(signal.SIGCHLD)
    batches, (first, second) = workers_at_work(data)
    assert signal.getsignal(signal.SIGCHLD) == handler
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"--num-workers 2: a process that loads images was killed.*fewer") as error:
        list(batches)
    assert "\n" not in str(error.value)
    del error, batches
    gc.collect()  # the error's traceback may hold the iterator in a cycle
    second.join(10)
    assert second.exitcode == 0


def trainer(path, ending, pipe, errors):
    """What train.py does around a loader, in a process of its own: begin, take batches, end by whatever comes."""
    sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115
    data = build_dataset(path, SIZE, num_classes=3, seed=0)
    batches = iter(train_loader(data, seed=0, num_steps=900, global_batch_size=8, batch_size=8, num_workers=2))
    next(batches)
    pipe.send([worker.pid for worker in multiprocessing.active_children()])
    pipe.recv()
    if ending == "own error":
        raise FloatingPointError("broken on purpose")
    try:
        for _ in batches:
            time.sleep(60 if ending == "killed" else 0)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("ending", "says"),
    [
        ("own error", "FloatingPointError: broken on purpose"),
        ("worker killed", "error: --num-workers 2: a process that loads images was killed"),
        ("tar truncated", "train.tar was cut while in use"),
        ("killed", ""),
    ],
)
def test_a_trainer_ends_within_seconds_and_takes_its_workers_along(tmp_path, ending, says):
    tar, errors = class_tars(tmp_path / "train.tar", small_classes()), tmp_path / "errors"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=trainer, args=(tar, ending, theirs, errors))
    process.start()
    workers = ours.recv()
    if ending == "tar truncated":
        os.truncate(tar, 2048)
    elif ending == "worker killed":
        os.kill(workers[0], signal.SIGKILL)
    ours.send("go on")
    if ending == "killed":
        process.kill()
    process.join(20)
    assert process.exitcode == (-signal.SIGKILL if ending == "killed" else 1)
    lines = errors.read_text().splitlines()
    if ending != "killed":  # then a worker that was just handing over a batch may print multiprocessing's complaint
        assert says in lines[-1] and (len(lines) == 1 or ending == "own error")
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
