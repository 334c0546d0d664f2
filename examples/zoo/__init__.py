"""Tiny random models of every architecture that must be understood, with what is true of them."""

from zoo.decoders import DECODERS
from zoo.encoders import ENCODERS
from zoo.family import Attention, Family, enliven
from zoo.images import IMAGES
from zoo.sequences import SEQUENCES
from zoo.written import WRITTEN

FAMILIES: dict[str, Family] = {
    f.name: f for f in (*DECODERS, *ENCODERS, *SEQUENCES, *IMAGES, *WRITTEN)
}

__all__ = ["FAMILIES", "Attention", "Family", "enliven"]
