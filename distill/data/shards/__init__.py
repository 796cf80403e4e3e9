"""Shards on disk: index, reading order, stream and writer."""

from distill.data.base import Batch
from distill.data.shards.dataset import Shards

__all__ = ["Batch", "Shards"]
