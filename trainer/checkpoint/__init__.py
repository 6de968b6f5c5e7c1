"""Checkpoints: verified, atomic, and restorable on any world size, plan and table kernel.

    place.py      a folder or a fsspec URL that holds checkpoints; what makes one exist
    manifest.py   what a checkpoint holds: every tensor, its file, its hashes; the manifest covers itself too
    files.py      tensors <-> verified pieces of files
    storage.py    both under torch.distributed.checkpoint: its planning, our files
    state.py      a training run as named tensors, the same names for every plan and kernel
    saver.py      when and how a run saves: staging, background writing, deltas, what is kept
    restore.py    choosing a checkpoint, comparing it with the config, loading it

docs/checkpoints.md is the user's page.
"""
