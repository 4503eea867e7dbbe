"""CPU backend: thin launchers over the kernels compiled into ``emo_kernels._C``."""

from emo_kernels.cpu.irmb import irmb, irmb_bind, irmb_unsupported

__all__ = ["irmb", "irmb_bind", "irmb_unsupported"]
