"""The tar index: right bytes, clear errors, and a file that survives races, damage and replaced tars."""

import io
import multiprocessing
import os
import tarfile
import time
import zipfile

import numpy as np
import pytest

from dataset import build_dataset, tar_index
from dataset.imagenet import open_source
from dataset.tar_index import build_index, load_index
from tests.helpers.dataset_tars import class_tars, contents, expected, image_file, small_classes, tar_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tar(tmp_path):
    return class_tars(tmp_path / "train.tar", small_classes())


def stored(tar):
    return tar.with_name(tar.name + ".index.npz")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_image_is_found_with_its_bytes_and_class(tmp_path, form):
    classes = small_classes()
    if form != tarfile.USTAR_FORMAT:
        long = "deep/" * 25 + "ünder/" + "n00000001_long.JPEG"  # a GNU "L" or a pax "path" record
        classes["n00000001"] |= {long: image_file(5)}
    classes["n00000002"] |= {"._n00000002_1.JPEG": b"resource fork", "readme.txt": b"no image"}
    shuffled = dict(sorted(classes.items(), reverse=True))  # labels are ranks of the names, not of the places
    source = open_source(class_tars(tmp_path / "train.tar", shuffled, form), 3)
    assert source.classes == ["n00000000", "n00000001", "n00000002"]
    found = contents(source)
    assert len(found) == len(source) == 24 + (form != tarfile.USTAR_FORMAT)
    for name, content in expected(small_classes()).items():
        assert found[name] == content
    if form != tarfile.USTAR_FORMAT:
        assert image_file(5) in found.values()


def test_numbers_over_8_gib_are_read_in_base_256():
    info = tarfile.TarInfo("big")
    info.size = 9 * 2**30
    assert tar_index._number(info.tobuf(tarfile.GNU_FORMAT)[124:136]) == info.size


def test_payloads_are_not_read(tar, monkeypatch):
    asked = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: asked.append(size) or pread(fd, size, offset))
    build_index(tar)
    assert max(asked) == 512 and len(asked) < 24 + 3 + 8


def pax_size(text):
    """A tar whose pax record claims this size for its member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("n0.tar")
        member.pax_headers = {"size": text}
        tar.addfile(member)
    return file.getvalue()


def with_size(field):
    """A tar whose header has this size field and a right checksum."""
    header = bytearray(tarfile.TarInfo("n0.tar").tobuf())
    header[124:136], header[148:156] = field, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (tar_bytes({}), "an empty tar"),
        (tar_bytes({"a.JPEG": image_file(0)}), "a flat tar (a.JPEG lies directly in it)"),
        (b"\x1f\x8b" + bytes(range(256)) * 8, "compressed or not a tar"),
        (tar_bytes({"n0.tar": tar_bytes({"readme": b"x"})}), "class n0 holds no images"),
        (tar_bytes({"a/n0.tar": tar_bytes({"0.JPEG": b"x"}), "b/n0.tar": b""}), "two class tars are named n0"),
        (tar_bytes({"n0.tar": tar_bytes({"0.JPEG": image_file(0)})[:1024]}), "class n0: truncated: 0.JPEG needs"),
        (tar_bytes({"\x1b[2Ja.JPEG": b"x"}), r"a flat tar (\x1b[2Ja.JPEG lies directly in it)"),
        (pax_size("12x"), "a pax header whose size is no number: 12x; copy"),
        (pax_size("-5"), "a pax header whose size is no number: -5; copy"),
        (pax_size("9" * 5000), "a pax header whose size is no number: 9999"),
        (pax_size("\x1b[31m"), r"a pax header whose size is no number: \x1b[31m; copy"),
        (with_size(b"-0000001000\0"), "no tar header at byte 0"),
        (with_size(b"0000001_000\0"), "no tar header at byte 0"),
    ],
)
def test_unusable_tars_are_named(tmp_path, content, says):
    path = tmp_path / "train.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.tar") as error:
        build_dataset(path, 32, num_classes=1, seed=0)
    assert says in str(error.value)
    assert not stored(path).exists()


def test_a_tar_cut_anywhere_is_refused(tar):
    whole = tar.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in [1, 511, 512, 513, 700, end // 3, end // 2, end - 1, (end + 511) // 512 * 512]:
        tar.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train.tar.*(truncated|damaged)"):
            build_index(tar)


def test_a_damaged_header_is_refused(tar):
    whole = bytearray(tar.read_bytes())
    place = whole.index(b"n00000001_3.JPEG")
    for offset in (0, 100, 124, 130, 150):  # name, mode, size, size, checksum
        damaged = whole.copy()
        damaged[place + offset] ^= 0x41
        tar.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"class n00000001"):
            build_index(tar)


def test_the_stored_index_is_used_until_the_tar_changes(tar, monkeypatch):
    built = []
    build = tar_index.build_index
    monkeypatch.setattr(tar_index, "build_index", lambda path: built.append(path) or build(path))
    first = load_index(tar)
    again = load_index(tar)
    assert len(built) == 1
    for one, other in zip(first, again):
        assert np.array_equal(one, other)
    os.utime(tar, ns=(0, time.time_ns() - 10**9))  # other time
    load_index(tar)
    assert len(built) == 2
    class_tars(tar, small_classes(4))  # other tar
    assert len(load_index(tar).classes) == 4 and len(built) == 3


def test_a_tar_replaced_with_the_same_size_and_time_is_noticed(tar):
    load_index(tar)
    before = tar.stat()
    files = small_classes()
    files["n00000000"]["n00000000_0.JPEG"] += bytes(1024)  # what follows moves by two blocks
    moved = tar_bytes({f"{name}.tar": tar_bytes(content) for name, content in files.items()})
    tar.write_bytes(moved[: before.st_size].ljust(before.st_size, b"\0"))
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents(open_source(tar)) == expected(files)


def test_every_damage_to_the_index_file_is_noticed(tar):
    whole = load_index(tar)
    good = stored(tar).read_bytes()
    damaged = [b"", good[:10], good[: len(good) // 2], good[:-1], b"\x80\x04pickle" + good]
    for place in np.linspace(0, len(good) - 1, 60).astype(int):
        damaged.append(good[:place] + bytes([good[place] ^ 0x55]) + good[place + 1 :])
    for content in damaged:
        stored(tar).write_bytes(content)
        for one, other in zip(load_index(tar), whole):
            assert np.array_equal(one, other)
    assert stored(tar).read_bytes()[:2] == b"PK"


def test_an_index_file_with_a_damaged_length_is_noticed(tmp_path):
    tar = class_tars(tmp_path / "many.tar", {"n0": {f"{i}.JPEG": b"x" for i in range(4000)}})
    load_index(tar)
    good = stored(tar).read_bytes()
    assert good.count(b"(4000,)") == 2  # numpy alone would read the shorter arrays without complaint
    stored(tar).write_bytes(good.replace(b"(4000,)", b"(2000,)"))
    assert len(load_index(tar).offsets) == 4000


def test_the_index_file_holds_no_pickle(tar):
    load_index(tar)
    with np.load(stored(tar), allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)


def test_read_only_folders_use_the_cache(tar, cache):
    stored(tar).mkdir()  # nothing can be stored there, even by root
    first = load_index(tar)
    assert [file.name.split(".")[-2:] for file in cache.iterdir()] == [["index", "npz"]]
    assert np.array_equal(load_index(tar).offsets, first.offsets)
    cache_file = next(cache.iterdir())
    cache_file.unlink()
    cache.rmdir()
    cache.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"stored nowhere .* set SPHEREAR_CACHE"):
        load_index(tar)


def test_no_temporary_file_is_left_when_storing_fails(tar, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(ValueError, match="No space left on device"):
        load_index(tar)
    assert sorted(file.name for file in tar.parent.iterdir()) == ["cache", "train.tar"]


def _start(tar, barrier, results):
    builds = []
    build = tar_index.build_index

    def slow(path):
        builds.append(path)
        time.sleep(0.3)
        return build(path)

    tar_index.build_index = slow
    barrier.wait()
    images = len(load_index(tar).offsets)
    results.put((images, len(builds)))


def test_eight_processes_at_once_build_once(tar):
    stored(tar).write_bytes(b"PK half-written")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_start, args=(tar, barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [images for images, _ in answers] == [24] * 8
    assert sum(builds for _, builds in answers) == 1


def test_memory_and_file_of_imagenet_size(tmp_path, tar):
    images = 1_281_167
    offsets = np.arange(images) * 1024
    index = tar_index.TarIndex(["n"], np.array([images]), offsets, np.zeros(images, np.uint32))
    assert index.offsets.nbytes + index.sizes.nbytes < 20e6
    tar_index._store(index, tar, tar.stat())
    assert stored(tar).stat().st_size < 40e6
    stored(tar).unlink()


def test_a_record_about_a_member_is_never_read_whole_when_it_is_huge(tmp_path):
    header = bytearray(tarfile.TarInfo("././@LongLink").tobuf())
    header[156:157], header[124:136], header[148:156] = b"L", b"%011o\0" % 2**32, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "train.tar"
    path.write_bytes(header)
    os.truncate(path, 2**32 + 2048)
    with pytest.raises(ValueError, match="no tar header at byte 0"):
        build_index(path)


def test_class_tars_may_be_named_in_capitals(tmp_path):
    path = tmp_path / "train.tar"
    path.write_bytes(tar_bytes({"n1.TAR": tar_bytes({"1.JPEG": b"x"}), "n0.Tar": tar_bytes({"0.JPEG": b"y"})}))
    source = open_source(path, 2)
    assert source.classes == ["n0", "n1"] and source.read(0) == b"y"


@pytest.mark.parametrize("part, change", [
    ("ends", lambda values: values[:-1]), ("ends", lambda values: values + 5), ("sizes", lambda values: values[:-1]),
    ("offsets", lambda values: values.astype(float)), ("offsets", lambda values: values[:0]),
])  # fmt: skip
def test_an_index_whose_parts_do_not_fit_is_built_anew(tmp_path, part, change):
    path = class_tars(tmp_path / "train.tar", small_classes())
    good = load_index(path)
    stored = next(tmp_path.glob("*.npz"))
    with np.load(stored, allow_pickle=False) as file:
        parts = {name: file[name] for name in file.files}
    np.savez(stored, **{**parts, part: change(parts[part])})
    again = load_index(path)
    assert again.classes == good.classes
    assert all((a == b).all() for a, b in zip(again[1:], good[1:], strict=True))


@pytest.mark.parametrize("what", ["class", "image"])
def test_a_tar_of_other_names_with_the_same_size_and_time_is_noticed(tar, what):
    """Every image lies where it lay: labels would be another tar's."""
    assert load_index(tar).classes[0] == "n00000000"
    before = tar.stat()
    old, new = (b"n00000000.tar", b"n00000009.tar") if what == "class" else (b"n00000000_0.JPEG", b"n00000000_0.JPEX")
    content = bytearray(tar.read_bytes())
    start = content.index(old)
    header = content[start : start + 512]
    header[: len(new)] = new
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[start : start + 512] = header
    tar.write_bytes(content)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    fresh = load_index(tar)
    assert fresh.classes[-1] == "n00000009" if what == "class" else len(fresh.offsets) == 23


@pytest.mark.parametrize("content", [b"mine", b"", b"PK"])
def test_another_programs_file_of_the_indexs_name_is_left_alone(tar, cache, content):
    stored(tar).write_bytes(content)
    if content == b"PK":  # an .npz, but none of ours
        np.savez(stored(tar), names=np.arange(3))
    before = stored(tar).read_bytes()
    assert len(load_index(tar).classes) == len(load_index(tar).classes) == 3
    assert stored(tar).read_bytes() == before and len(list(cache.iterdir())) == 1


def test_an_index_with_a_hostile_header_is_built_anew(tar):
    """numpy's reader of headers raises kinds of its own for these."""
    load_index(tar)
    for text in (b"(" * 9000, b"{'descr': '<i8'" + b"[" * 300, b"\xff" * 50):
        header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        with zipfile.ZipFile(stored(tar), "w") as archive:
            archive.writestr("key.npy", header)
        assert len(load_index(tar).classes) == 3
