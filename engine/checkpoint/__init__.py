"""Checkpoints that are whole or not there.

    <root>/step-00001000/
        model.safetensors      parameters under their full names; tied weights once
        weights.safetensors    those that are trained in another form than the model has them, where there are any
        config.json            the model's configuration, in Hugging Face form
        optimizer.safetensors  state, under `<param>/<slot>`
        trainer.json           step and whatever else resumes the run; size and sha256 of the files above

A folder is written beside its place under a hidden name, fsynced file by file, and renamed into place, so a kill or a
power cut leaves the previous checkpoint as it was. Everything is data: tensors and JSON, never code. One process at a
time writes to a root.
"""

from .fit import check_fit, restore_into
from .form import CONFIG, MODEL, OPTIMIZER, STEP, TRAINER, WEIGHTS
from .reader import Checkpoint, Latest, Reader, latest, load, read, verify
from .store import prune, save
from .tensorfile import CheckpointError, TensorFile, WriteError

__all__ = [
    "CONFIG",
    "MODEL",
    "OPTIMIZER",
    "STEP",
    "TRAINER",
    "WEIGHTS",
    "Checkpoint",
    "CheckpointError",
    "Latest",
    "Reader",
    "TensorFile",
    "WriteError",
    "check_fit",
    "latest",
    "load",
    "prune",
    "read",
    "restore_into",
    "save",
    "verify",
]
