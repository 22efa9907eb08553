"""Do generated pictures show the class they were asked for? A plain classifier, fitted on the real ones, answers.

`python -m dataset.judge DATA SAMPLES.npz`: the training data (tar or folder), and pictures `arr_0`, uint8 (N, S, S, 3),
with the labels asked for, `arr_1`.
"""

import argparse

import numpy as np

from dataset.imagenet import ImageDataset, open_source


def as_vectors(pictures: np.ndarray) -> np.ndarray:
    """Grey values (N, S·S) in [0, 1] of uint8 pictures (N, S, S, 3)."""
    return pictures.mean(axis=-1).reshape(len(pictures), -1) / 255


def class_agreement(data_path: str, samples: str) -> float:
    """Share of samples that a support-vector classifier, fitted on the real pictures, labels as they were asked for.

    Raises ValueError where the samples carry no labels.
    """
    from sklearn.svm import SVC

    with np.load(samples, allow_pickle=False) as arrays:
        if not {"arr_0", "arr_1"} <= set(arrays.files):
            raise ValueError(f"{samples}: needs arr_0 (pictures) and arr_1 (labels), has {', '.join(arrays.files)}")
        generated, asked = arrays["arr_0"], arrays["arr_1"]
    data = ImageDataset(open_source(data_path), image_size=generated.shape[1], seed=0)
    real = [data[i] for i in range(len(data))]
    pictures = np.stack([sample.image.permute(1, 2, 0).numpy() for sample in real])
    judge = SVC(C=10).fit(as_vectors(pictures), [sample.label for sample in real])
    return float((judge.predict(as_vectors(generated)) == asked).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="real pictures: tar of class tars, or folder of class folders")
    parser.add_argument("samples", help="generated pictures with the labels asked for (.npz)")
    args = parser.parse_args()
    try:
        agreement = class_agreement(args.data, args.samples)
    except (ValueError, OSError) as error:
        raise SystemExit(f"dataset.judge: {error}") from None
    print(f"class agreement: {agreement:.1%} of the samples are recognised as the class they were asked for")


if __name__ == "__main__":
    main()
