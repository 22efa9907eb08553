"""Training order and pictures: independent of workers, processes and the resume point; bad pictures; check; toy."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dataset import CropKey, build_dataset, crop_probability, train_loader
from dataset.check import check
from dataset.loader import epoch_order
from dataset.toy import write_toy
from tests.helpers.dataset_tars import bad_pictures, class_tars, picture, small_classes

ROOT = Path(__file__).parent.parent
SIZE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    return build_dataset(class_tars(tmp_path / "train.tar", small_classes()), SIZE, num_classes=3, seed=5)


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
    """All pictures of some batches as (index, label, bytes)."""
    return [(int(i), int(l), x.numpy().tobytes()) for b in batches for x, l, i in zip(b.image, b.label, b.index)]


def test_batches_are_uint8_and_contiguous(data):
    for workers in (0, 1):
        batch = load(data, num_steps=1, num_workers=workers)[0]
        assert batch.image.dtype == torch.uint8 and batch.image.shape == (8, 3, SIZE, SIZE)
        assert batch.image.is_contiguous() and batch.label.dtype == torch.int64 and list(batch.bad) == [""] * 8
        assert [data.label(int(i)) for i in batch.index] == batch.label.tolist()


def test_the_same_pictures_for_any_number_of_workers(data):
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


def test_an_epoch_shows_every_picture_once_and_the_incomplete_step_is_left_out(data):
    loader = train_loader(data, seed=1, num_steps=6, global_batch_size=8, batch_size=4)
    assert (loader.steps_per_epoch, loader.batches_per_step) == (3, 2)
    order = [index for index, _, _ in rows(loader)]
    assert sorted(order[:24]) == sorted(order[24:]) == list(range(24)) and order[:24] != order[24:]
    loader = train_loader(data, seed=1, num_steps=2, global_batch_size=10, batch_size=10)
    assert loader.steps_per_epoch == 2 and len(set(row[0] for row in rows(loader))) == 20


def test_orders_differ_by_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 1000) for seed in range(2) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert max((a == b).mean() for i, a in enumerate(orders) for b in orders[:i]) < 0.02
    assert epoch_order(7, 2, 6).tolist() == [5, 4, 3, 2, 1, 0]  # never changes


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


def test_probability_zero_is_the_centre_crop_and_one_is_not(data):
    data.flip = False
    data.fast = False
    for index in range(24):
        assert torch.equal(data[CropKey(0, index, 0.0)].image, data[index].image)
    different = [not torch.equal(data[CropKey(0, index, 1.0)].image, data[index].image) for index in range(24)]
    assert sum(different) > 15
    assert not torch.equal(data[CropKey(0, 3, 1.0)].image, data[CropKey(1, 3, 1.0)].image)


def test_flips_come_half_of_the_time_and_can_be_off(data):
    data.fast = False
    flipped = 0
    for epoch in range(4):
        for index in range(24):
            image, centre = data[CropKey(epoch, index, 0.0)].image, data[index].image
            flipped += torch.equal(image, centre.flip(-1))
            assert torch.equal(image, centre) or torch.equal(image, centre.flip(-1))
    assert 32 < flipped < 64


def test_fast_and_exact_pictures_are_close(data):
    fast = rows(load(data))
    data.fast = False
    exact = rows(load(data))
    a, b = (np.array([list(row[2]) for row in side]) for side in (fast, exact))
    assert [row[:2] for row in fast] == [row[:2] for row in exact]
    assert 0 < (a != b).mean() < 0.02 and np.abs(a - b).max() <= 2


def test_the_default_loader_reads_evaluation_pictures(data):
    batch = next(iter(DataLoader(data, batch_size=24)))
    assert batch.index.tolist() == list(range(24)) and batch.label.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert data[-1].index == 23 and data[-1].label == 2
    with pytest.raises(IndexError):
        data[24]


def test_grey_pictures_have_three_channels(tmp_path):
    tar = class_tars(tmp_path / "grey.tar", {"n0": {"0.JPEG": picture(0, mode="L"), "1.JPEG": picture(1)}})
    data = build_dataset(tar, SIZE, num_classes=1, seed=0)
    for sample in (data[0], data[CropKey(0, 0, 1.0)]):
        assert sample.image.shape == (3, SIZE, SIZE) and torch.equal(sample.image[0], sample.image[2])
    assert load(data, global_batch_size=2, batch_size=2, num_steps=1)[0].image.shape == (2, 3, SIZE, SIZE)


def _read_all(source, reads, answer):
    rng = np.random.RandomState(os.getpid() % 2**31)
    wrong = 0
    for index in rng.randint(0, len(source), reads):
        content = source.read(index)
        wrong += hashlib.sha256(content).hexdigest() != source.digests[index]
    answer.put(wrong)


def test_forked_workers_sharing_the_file_read_the_right_bytes(data):
    source = data.source
    source.digests = [hashlib.sha256(source.read(index)).hexdigest() for index in range(len(source))]
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    processes = [context.Process(target=_read_all, args=(source, 2500, answer)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [answer.get(timeout=60) for _ in processes] == [0] * 4
    for process in processes:
        process.join()
    assert os.lseek(source._fd, 0, os.SEEK_CUR) == 0  # the position that all of them share was never used


def test_a_pickled_data_set_opens_its_own_file(data):
    copy = pickle.loads(pickle.dumps(data))  # as spawned workers get it
    assert copy.source._fd != data.source._fd
    assert torch.equal(copy[3].image, data[3].image)


@pytest.fixture
def damaged(tmp_path):
    """7 bad pictures among 63."""
    classes = small_classes(classes=2, pictures=28)
    for kind, (content, _) in bad_pictures().items():
        classes["n00000000"][f"{kind}.JPEG"] = content
    return class_tars(tmp_path / "damaged.tar", classes)


def test_bad_pictures_are_replaced_alike_everywhere_counted_and_named(damaged):
    data = build_dataset(damaged, SIZE, num_classes=2, seed=0)
    told = []
    expected = None
    for workers, fast in ((0, True), (2, True), (0, False)):
        data.fast = fast
        told.clear()
        loader = train_loader(
            data,
            seed=0,
            num_steps=18,
            global_batch_size=7,
            batch_size=7,
            num_workers=workers,
            max_bad_share=0.2,
            report=told.append,
        )
        batches = list(loader)
        assert loader.num_replaced == 14 and len(told) == 7  # two epochs, each name once
        for kind, (_, says) in bad_pictures().items():
            assert any(f"n00000000/{kind}.JPEG" in text and says in text for text in told)
        for text in told:
            assert text.startswith("bad picture replaced (")
        if fast:
            expected = expected or rows(batches)
            assert rows(batches) == expected
    replaced = [b for batch in batches for b in zip(batch.bad, batch.index.tolist(), batch.label.tolist()) if b[0]]
    assert len({index for _, index, _ in replaced}) == 7
    assert {label for _, _, label in replaced} == {0, 1}  # the label is the replacement's


def test_the_replacement_keeps_the_crop_draws_of_the_place(damaged):
    data = build_dataset(damaged, SIZE, num_classes=2, seed=0)
    bad = next(i for i in range(len(data)) if data.name(i).endswith("cmyk.JPEG"))
    chosen = {next(i for i in range(len(data)) if torch.equal(data[i].image, data[bad].image)) for _ in range(2)}
    assert chosen != {bad} and data[bad].bad == f"{data.name(bad)}: mode CMYK instead of RGB or grey"
    assert data[bad].index == bad


def test_too_many_bad_pictures_are_an_error(damaged, tmp_path):
    data = build_dataset(damaged, SIZE, num_classes=2, seed=0)
    with pytest.raises(ValueError, match=r"2 bad pictures in one epoch, more than --max-bad-share 0\.001"):
        load(data, num_steps=9, global_batch_size=7, batch_size=7)
    classes = small_classes()
    classes["n00000000"]["bad.JPEG"] = b""
    data = build_dataset(class_tars(tmp_path / "one.tar", classes), SIZE, num_classes=3, seed=0)
    assert len(load(data, num_steps=30, global_batch_size=5, batch_size=5)) == 30  # a single one never is
    hopeless = class_tars(tmp_path / "hopeless.tar", {"n0": {f"{i}.JPEG": b"" for i in range(4)}})
    data, reads = build_dataset(hopeless, SIZE, num_classes=1, seed=0), []
    with pytest.raises(ValueError, match=r"16 bad pictures in a row, the first n0/\d.JPEG: empty"):
        load(data, global_batch_size=2, batch_size=2)
    data.source.read = lambda index: reads.append(index) or b""
    with pytest.raises(ValueError, match="16 bad pictures in a row"):
        data[0]
    assert len(reads) == 16 and set(reads) == {0, 1, 2, 3}


def test_a_tar_cut_while_in_use_is_an_io_error(data):
    os.truncate(data.source.path, 2048)
    with pytest.raises(OSError, match="was cut while in use"):
        data[20]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"global_batch_size": 9, "batch_size": 2}, "--global-batch-size 9 is not a multiple of 1 processes x 2"),
        ({"world_size": 3, "batch_size": 2}, "--global-batch-size 8 is not a multiple of 3 processes x 2"),
        ({"global_batch_size": 32}, "--global-batch-size 32 is more than the 24 pictures"),
        ({"start_step": 8}, "start step 8 is not within 0 .. 7 steps; raise --epochs or --max-steps"),
        ({"aug_decay_start": 5, "aug_decay_end": 4}, "--aug-decay-end-epoch 4 lies before --aug-decay-start-epoch 5"),
        ({"num_workers": -1}, "--num-workers -1 is negative"),
    ],
)
def test_numbers_that_do_not_fit_are_named(data, options, says):
    with pytest.raises(ValueError) as error:
        load(data, **options)
    assert says in str(error.value)


def test_workers_survive_the_signals_of_a_stopping_job(data):
    loader = iter(train_loader(data, seed=0, num_steps=60, global_batch_size=8, batch_size=2, num_workers=2))
    next(loader)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid, number)
    assert len(list(loader)) == 239
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def test_check_says_what_is_there(damaged, tmp_path, capsys):
    assert check(damaged) == 1
    out = capsys.readouterr().out
    assert "63 pictures of 2 classes" in out and "per class: 28 to 35" in out and "bad pictures: 7 (11.111%)" in out
    for kind, (_, says) in bad_pictures().items():
        assert any(f"n00000000/{kind}.JPEG" in line and says in line for line in out.splitlines())
    assert check(damaged, num_classes=7) == 2 and "--num-classes 7" in capsys.readouterr().out
    command = [sys.executable, "-m", "dataset.check"]
    good = class_tars(tmp_path / "good.tar", small_classes())
    run = subprocess.run([*command, good, "--num-workers", "1"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "bad pictures: 0 (0.000%)" in run.stdout, run.stderr
    assert "shorter side: 33 to 35 pixels, longest 43" in run.stdout


def test_the_toy_is_the_reference_and_is_written_once(tmp_path):
    pytest.importorskip("mlxtend")
    tar, reference = write_toy(tmp_path / "toy", count=20)
    times = tar.stat().st_mtime_ns, reference.stat().st_mtime_ns
    assert write_toy(tmp_path / "toy", count=20) == (tar, reference)
    assert times == (tar.stat().st_mtime_ns, reference.stat().st_mtime_ns)
    assert sorted(file.name for file in tar.parent.iterdir()) == ["mnist.tar", "reference.npz"]
    data = build_dataset(tar, 32, num_classes=10, seed=0)
    assert data.classes == [f"n{digit:08d}" for digit in range(10)] and len(data) == 20
    with np.load(reference, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (20, 32, 32, 3) and images.dtype == np.uint8
    rows_of_ink, columns_of_ink = images.sum((0, 2, 3)), images.sum((0, 1, 3))
    for ink in (rows_of_ink, columns_of_ink):  # MNIST's digits are centred by mass
        assert abs((ink * np.arange(32)).sum() / ink.sum() - 16) < 0.5
    read = np.stack([data[index].image.permute(1, 2, 0).numpy() for index in range(20)])
    assert [data.label(index) for index in range(20)] == sorted(labels.tolist())
    ordered = images[np.argsort(labels, kind="stable")]
    assert np.abs(read.astype(int) - ordered).max() <= 2
    with pytest.raises(ValueError, match="--count 5: expected a multiple of 10"):
        write_toy(tmp_path / "other", count=5)
