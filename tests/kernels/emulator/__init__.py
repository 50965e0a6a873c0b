"""Executes the PTX that Triton compiles for a GPU, on the CPU: sm_80 to sm_90.

numpy runs the threads of several programs in step. Memory that was not written is poisoned, accesses out of
bounds raise, races between barriers are reported, asynchronous copies and wgmma arrive at their waits, and
tensor cores read and round operands as the hardware does. Not emulated: what ptxas does below PTX, and time.
"""

from .launch import Emulation, Launch, emulated
from .ptx import EmulationError

__all__ = ["Emulation", "EmulationError", "Launch", "emulated"]
