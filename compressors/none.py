"""No compression: every visual token goes through every layer. The arm that others are held against."""

from dataclasses import dataclass

from xcomp.compressor import Compressor


class NoCompression(Compressor):
    """Keeps all tokens."""

    @dataclass
    class Config:
        pass
