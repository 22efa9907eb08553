"""Images for training: the raw ImageNet tar or a folder, ADM's crops, and an order that can start at any step."""

from dataset.imagenet import CropKey, ImageDataset, Sample, build_dataset
from dataset.loader import TrainLoader, crop_probability, train_loader

__all__ = ["CropKey", "ImageDataset", "Sample", "TrainLoader", "build_dataset", "crop_probability", "train_loader"]
