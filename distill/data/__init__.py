"""Data: where batches come from.

A source has `.info` (shape, classes, count), `.batch_size`, `.loader(rank, world, start)`, an endless iterator of
batches whose n-th item depends on (seed, rank, world, n) only, and `.all()`, a fixed set for evaluation:

    shards.Shards     webdataset shards on disk             x, label, caption
    pairs.Pairs       a teacher's solved pairs on disk      x, z, label
    toy.Samples       draws from an exact distribution      x, label
    toy.Conditions    no data, for methods that need none   label
    toy.Tensors       random numbers in place of a set      x, conditions by name

A batch is a dict: "x" float32 (B, ...), images (B, C, H, W) in [-1, 1]; "label" int64 (B,), -1 for no class; "caption"
list of str. `write` turns folders, .npz and idx files into shards. This package is the one door to webdataset.
"""
