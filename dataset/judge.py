"""Do generated pictures show the class they were asked for? A plain classifier, fitted on the real ones, answers.

`python -m dataset.judge REFERENCE.npz SAMPLES.npz`: both with `arr_0` uint8 (N, H, W, 3) and `arr_1` labels.
"""

import argparse

import numpy as np


def read_pictures(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures (N, H·W) in [0, 1] and labels (N,) of an .npz."""
    with np.load(path, allow_pickle=False) as arrays:
        if not {"arr_0", "arr_1"} <= set(arrays.files):
            raise ValueError(f"{path}: needs arr_0 (pictures) and arr_1 (labels), has {', '.join(arrays.files)}")
        pictures, labels = arrays["arr_0"], arrays["arr_1"]
    return pictures.mean(axis=-1).reshape(len(pictures), -1) / 255, labels


def class_agreement(reference: str, samples: str) -> float:
    """Share of samples that a support-vector classifier, fitted on the reference, labels as they were asked for."""
    from sklearn.svm import SVC

    pictures, labels = read_pictures(reference)
    judge = SVC(C=10).fit(pictures, labels)
    pictures, labels = read_pictures(samples)
    return float((judge.predict(pictures) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help="real pictures with labels")
    parser.add_argument("samples", help="generated pictures with the labels asked for")
    args = parser.parse_args()
    agreement = class_agreement(args.reference, args.samples)
    print(f"class agreement: {agreement:.1%} of the samples are recognised as the class they were asked for")


if __name__ == "__main__":
    main()
