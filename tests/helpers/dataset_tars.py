"""Small tars of class tars for the tests of dataset/."""

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 30, mode: str = "RGB", form: str = "JPEG") -> bytes:
    """A smooth random picture as the bytes of a file."""
    rng = np.random.RandomState(seed)
    image = Image.fromarray(rng.randint(0, 256, (4, 5, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, form, **({"quality": 92} if form == "JPEG" else {}))
    return file.getvalue()


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(file, "PNG")
    return file.getvalue()


def bad_pictures() -> dict[str, tuple[bytes, str]]:
    """Kind -> (bytes, what the reason must say), all of them in files named .JPEG."""
    good = picture(7, 60, 50)
    return {
        "empty": (b"", "empty"),
        "noise": (bytes(range(256)) * 4, "corrupt"),
        "truncated": (good[: len(good) // 2], "truncated"),
        "cmyk": (picture(1, mode="CMYK"), "CMYK"),
        "palette": (picture(2, mode="P", form="PNG"), "mode P"),
        "sixteen": (sixteen_bit(), "16 bits"),
        "png": (picture(3, form="PNG"), "PNG named as a JPEG"),
    }


def tar_bytes(members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def class_tars(path, classes: dict[str, dict[str, bytes]], form: int = tarfile.GNU_FORMAT):
    """Write a tar of class tars {class: {file name: bytes}} and return its path."""
    path.write_bytes(tar_bytes({f"{name}.tar": tar_bytes(files, form) for name, files in classes.items()}, form))
    return path


def small_classes(classes: int = 3, pictures: int = 8) -> dict[str, dict[str, bytes]]:
    return {
        f"n{k:08d}": {f"n{k:08d}_{i}.JPEG": picture(100 * k + i, 36 + i, 33 + k) for i in range(pictures)}
        for k in range(classes)
    }
