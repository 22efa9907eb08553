"""Checkpoint states that tell whether they are whole."""

import argparse

import torch


def state(step: int, size: int = 1000) -> dict:
    """A state whose every tensor tells its step."""
    weight = torch.full((size,), float(step))
    return {"model": {"a": weight, "b": torch.arange(5) + step}, "ema": {"a": weight}, "step": step, "optimizer": {},
            "args": argparse.Namespace(lr=1e-4, model="SphereAR-B"), "config": {"stem": (1, 2)}}  # fmt: skip


def is_whole(saved: dict) -> bool:
    return torch.equal(saved["model"]["a"], torch.full_like(saved["model"]["a"], float(saved["step"])))
