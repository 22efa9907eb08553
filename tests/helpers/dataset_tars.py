"""Small tars of class tars, and images good and bad to put into them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def image_file(seed: int, width: int = 40, height: int = 30, mode: str = "RGB", form: str = "JPEG") -> bytes:
    """A smooth random image as the bytes of a file."""
    return enlarged(np.random.RandomState(seed).randint(0, 256, (4, 5, 3), np.uint8), width, height, mode, form)


def enlarged(
    pixels: np.ndarray, width: int, height: int, mode: str = "RGB", form: str = "JPEG", quality: int = 92
) -> bytes:
    """A few pixels, uint8 (h, w, 3), as an image file of width x height."""
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, form, **({"quality": quality} if form == "JPEG" else {}))
    return file.getvalue()


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(file, "PNG")
    return file.getvalue()


def bad_images() -> dict[str, tuple[bytes, str]]:
    """Kind -> (bytes, what the reason must say), all of them in files named .JPEG."""
    good = image_file(7, 60, 50)
    return {
        "empty": (b"", "empty"),
        "noise": (bytes(range(256)) * 4, "corrupt"),
        "truncated": (good[: len(good) // 2], "truncated"),
        "damaged": (good[: len(good) // 2] + b"\xff\xd9", "damaged: premature end of data segment"),
        "cmyk": (image_file(1, mode="CMYK"), "CMYK"),
        "palette": (image_file(2, mode="P", form="PNG"), "mode P"),
        "sixteen": (sixteen_bit(), "16 bits"),
        "png": (image_file(3, form="PNG"), "PNG named as a JPEG"),
    }


def tar_bytes(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members.items():
            add(tar, name, content)
    return file.getvalue()


def class_tars(path: Path, classes: dict[str, dict[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    """Write a tar of class tars {class: {file name: bytes}} and return its path."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, files in classes.items():
            add(tar, f"{name}.tar", tar_bytes(files, form))
    return path


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def small_classes(classes: int = 3, images: int = 8) -> dict[str, dict[str, bytes]]:
    return {
        f"n{k:08d}": {f"n{k:08d}_{i}.JPEG": image_file(100 * k + i, 36 + i, 33 + k) for i in range(images)}
        for k in range(classes)
    }


def contents(source):
    return {f"{source.classes[label(source, i)]}/{source.file_name(i)}": source.read(i) for i in range(len(source))}


def label(source, index):
    return int(np.searchsorted(source.ends, index, side="right"))


def expected(classes):
    return {f"{name}/{file}": content for name, files in classes.items() for file, content in files.items()}


def damaged_tar(path):
    """Write a tar with 8 bad images among 64, and return its path."""
    classes = small_classes(classes=2, images=28)
    for kind, (content, _) in bad_images().items():
        classes["n00000000"][f"{kind}.JPEG"] = content
    return class_tars(path, classes)
