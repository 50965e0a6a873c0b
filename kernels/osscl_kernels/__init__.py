"""Fused kernels for OS-SCL: pure tensor functions, each beside its PyTorch reference."""
