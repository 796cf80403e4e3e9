"""Data sources.

    shards.Shards            webdataset shards on disk              x, label, caption, conditions by name
    shards.buckets.Buckets   shards of several shapes               the same
    pairs.Pairs              a teacher's solved pairs on disk       x, z, label
    toy.Samples              draws from an exact distribution       x, label
    toy.Conditions           labels for data-free methods           label
    toy.Tensors              random numbers in place of a dataset   x, conditions by name

All are a `base.Dataset`. `prepare` turns folders, .npz and idx files into shards; `encode` stores latents and text
embeddings. Only this package imports webdataset.
"""
