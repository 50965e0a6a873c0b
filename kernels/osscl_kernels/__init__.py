"""Fused kernels for OS-SCL: pure tensor functions, each beside its PyTorch reference."""

from .backend import keep_freed_memory
from .supcon import supcon_loss, supcon_loss_ref
from .tfgram_infer import LAYERS, Folded, fold_batchnorm, frames, tfgram_infer, tfgram_infer_ref
from .tfgram_train import tfgram_train, tfgram_train_ref, update_running_statistics

__all__ = [
    "LAYERS",
    "Folded",
    "fold_batchnorm",
    "frames",
    "keep_freed_memory",
    "supcon_loss",
    "supcon_loss_ref",
    "tfgram_infer",
    "tfgram_infer_ref",
    "tfgram_train",
    "tfgram_train_ref",
    "update_running_statistics",
]
